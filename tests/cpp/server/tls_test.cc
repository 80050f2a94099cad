// The HTTP server and the client of workers, with TLS between them.
#include <gtest/gtest.h>

#include <boost/asio/io_context.hpp>
#include <string>
#include <utility>

#include "net/upstream.h"
#include "server/http_handlers.h"
#include "server/http_server.h"
#include "server/raw_client.h"
#include "server/self_signed.h"

namespace kvrouter {
namespace {

using testing::echo;
using testing::RawClient;
using testing::SelfSigned;

struct Secure {
  explicit Secure(HttpHandler handler = echo, HttpLimits limits = {})
      : server("127.0.0.1", 0, [&](boost::asio::io_context&) { return HttpService{std::move(handler), nullptr}; },
               limits, {identity.certificate_file(), identity.key_file()}) {}

  SelfSigned identity;
  HttpServer server;
};

// (status, body) of a GET; status 0 and the reason where there was no answer.
std::pair<unsigned, std::string> get(boost::asio::io_context& io, UpstreamPool& pool, std::string_view path) {
  std::pair<unsigned, std::string> answer;
  const auto call = pool.get(path, std::chrono::seconds(30),
                             [&](unsigned status, std::string body) { answer = {status, std::move(body)}; });
  io.restart();
  io.run();
  return answer;
}

HostPort address_of(const Secure& secure, std::string host = "127.0.0.1") {
  return {std::move(host), std::to_string(secure.server.port()), true};
}

TEST(Tls, AnswersComeOverOneKeptConnection) {
  Secure secure;
  boost::asio::io_context io;
  UpstreamPool pool(io, address_of(secure), {}, client_tls(secure.identity.certificate_file()));
  for (int i = 0; i < 3; ++i) {
    const auto [status, body] = get(io, pool, "/x");
    EXPECT_EQ(status, 200u) << body;
    EXPECT_EQ(body, "GET /x  ");
    EXPECT_EQ(pool.idle(), 1u);
  }
}

TEST(Tls, LongAnswersArriveWhole) {
  const std::string text(3'000'000, 'x');
  Secure secure([&](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
    reply->begin_stream(200, "text/plain");
    for (std::size_t at = 0; at < text.size(); at += 300'000) reply->write(text.substr(at, 300'000));
    reply->end();
  });
  boost::asio::io_context io;
  UpstreamPool pool(io, address_of(secure), {}, client_tls(secure.identity.certificate_file()));
  EXPECT_EQ(get(io, pool, "/").second, text);
}

TEST(Tls, ACertificateThatNobodyVouchesFor_OrForAnotherName_IsRefused) {
  Secure secure;
  const SelfSigned stranger;
  boost::asio::io_context io;
  UpstreamPool distrusted(io, address_of(secure), {}, client_tls(stranger.certificate_file()));
  const auto [status, reason] = get(io, distrusted, "/");
  EXPECT_EQ(status, 0u);
  EXPECT_NE(reason.find("--upstream-ca"), std::string::npos) << reason;
  UpstreamPool misnamed(io, address_of(secure, "localhost"), {}, client_tls(secure.identity.certificate_file()));
  const auto [other_status, other_reason] = get(io, misnamed, "/");
  EXPECT_EQ(other_status, 0u);
  EXPECT_NE(other_reason.find("mismatch"), std::string::npos) << other_reason;
}

TEST(Tls, PlainHttp_IsToldSo) {
  Secure secure;
  RawClient client(secure.server.port());
  client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::string answer = client.read_to_end();
  EXPECT_EQ(answer.substr(0, 12), "HTTP/1.1 400");
  EXPECT_NE(answer.find("https://"), std::string::npos);
}

TEST(Tls, AHandshakeThatTakesTooLong_IsCutOff) {
  HttpLimits limits;
  limits.request_timeout = std::chrono::seconds(1);
  Secure secure(echo, limits);
  RawClient client(secure.server.port(), /*receive_timeout_s=*/30);
  client.send("\x16\x03\x01");
  EXPECT_EQ(client.read_to_end(), "");  // well before the receive timeout, or the next line would be sent
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (client.send("x") && std::chrono::steady_clock::now() < until) {
  }
  EXPECT_FALSE(client.send("x"));
}

TEST(Tls, StoppedWhileClientsShakeHands) {
  Secure secure;
  RawClient silent(secure.server.port()), half(secure.server.port());
  half.send("\x16\x03\x01\x02");
  secure.server.stop();
  EXPECT_EQ(silent.read_to_end(), "");
  EXPECT_EQ(half.read_to_end(), "");
}

TEST(Tls, ConnectionsInHandshakeCountAsConnections) {
  HttpLimits limits;
  limits.max_connections = 1;
  Secure secure(echo, limits);
  RawClient first(secure.server.port()), second(secure.server.port(), /*receive_timeout_s=*/30);
  EXPECT_EQ(second.read_to_end(), "");  // while the first one is kept
}

}  // namespace
}  // namespace kvrouter
