#include "server/forwarded_request.h"

#include <gtest/gtest.h>

namespace kvrouter {
namespace {

HttpRequest request_with(std::initializer_list<std::pair<const char*, const char*>> headers) {
  HttpRequest request{"POST", "/v1/completions", "a=1", "{}"};
  for (const auto& [name, value] : headers) request.headers.add(name, value);
  return request;
}

TEST(ForwardedRequest, KeepsWhatIsTheRequests) {
  const auto request = request_with({{"Traceparent", "00-1-2-01"}, {"Authorization", "Bearer x"}, {"X-A", "1"}});
  EXPECT_EQ(forwarded_request(request, {.authority = "h:1"}),
            "POST /v1/completions?a=1 HTTP/1.1\r\nHost: h:1\r\nTraceparent: 00-1-2-01\r\nAuthorization: Bearer x\r\n"
            "X-A: 1\r\nContent-Length: 2\r\n\r\n{}");
}

TEST(ForwardedRequest, LeavesOutWhatIsTheConnections) {
  const auto request = request_with({{"host", "other"},
                                     {"Connection", "close, X-Hop ,x-other"},
                                     {"x-hop", "1"},
                                     {"X-Other", "1"},
                                     {"Transfer-Encoding", "chunked"},
                                     {"content-length", "99"},
                                     {"TE", "trailers"},
                                     {"Upgrade", "h2c"},
                                     {"Expect", "100-continue"}});
  EXPECT_EQ(forwarded_request(request, {.authority = "h:1"}),
            "POST /v1/completions?a=1 HTTP/1.1\r\nHost: h:1\r\nContent-Length: 2\r\n\r\n{}");
}

TEST(ForwardedRequest, TheGatewaysTokenStaysHere_AndTheRankIsTheGatewaysToSay) {
  const auto request = request_with({{"authorization", "Bearer x"}, {"x-data-parallel-rank", "7"}});
  EXPECT_EQ(forwarded_request(request, {.authority = "h:1", .rank = 1, .with_authorization = false}),
            "POST /v1/completions?a=1 HTTP/1.1\r\nHost: h:1\r\nX-data-parallel-rank: 1\r\nContent-Length: 2\r\n\r\n{}");
}

TEST(ForwardedRequest, WithoutABody_HasNoLength) {
  EXPECT_EQ(forwarded_request({"GET", "/x", "", ""}, {.authority = "h:1"}), "GET /x HTTP/1.1\r\nHost: h:1\r\n\r\n");
}

}  // namespace
}  // namespace kvrouter
