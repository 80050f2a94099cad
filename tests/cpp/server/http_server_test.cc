#include "server/http_server.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/http_handlers.h"
#include "server/raw_client.h"

namespace kvrouter {
namespace {

using namespace std::chrono_literals;
using testing::body_of;
using testing::echo;
using testing::Kept;
using testing::post;
using testing::RawClient;
using testing::status_of;

TEST(HttpServer, KeepAlive_AnswersManyRequestsOnOneConnection) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  for (int i = 0; i < 100; ++i) {
    client.send(post("/a/b?x=" + std::to_string(i), "body"));
    const std::string answer = client.read_answer();
    EXPECT_EQ(status_of(answer), "HTTP/1.1 200 OK");
    EXPECT_EQ(body_of(answer), "POST /a/b x=" + std::to_string(i) + " body");
  }
}

TEST(HttpServer, Pipelined_AnswersInOrder) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    // Every other answer comes late and from another thread.
    if (request.body.back() % 2 == 0) return echo(std::move(request), std::move(reply));
    std::thread([request = std::move(request), reply = std::move(reply)]() mutable {
      std::this_thread::sleep_for(1ms);
      echo(std::move(request), std::move(reply));
    }).detach();
  });
  RawClient client(server.port());
  std::string all;
  for (int i = 0; i < 200; ++i) all += post("/", std::to_string(i));
  std::thread writer([&] { client.send(all); });
  for (int i = 0; i < 200; ++i) EXPECT_EQ(body_of(client.read_answer()), "POST /  " + std::to_string(i));
  writer.join();
}

TEST(HttpServer, Pipelined_InlineAnswers_DoNotRecurse) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  std::string all;
  for (int i = 0; i < 20000; ++i) all += "GET / HTTP/1.1\r\n\r\n";
  std::thread writer([&] { client.send(all); });
  for (int i = 0; i < 20000; ++i) ASSERT_EQ(body_of(client.read_answer()), "GET /  ");
  writer.join();
}

TEST(HttpServer, RequestInSmallPieces_IsPutTogether) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  for (const char c : post("/piece", "hello")) client.send(std::string_view(&c, 1));
  EXPECT_EQ(body_of(client.read_answer()), "POST /piece  hello");
}

TEST(HttpServer, LargeBodyAndAnswer_ArriveWhole) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  const std::string body(8 * 1024 * 1024, 'z');
  std::thread writer([&] { client.send(post("/", body)); });
  const std::string answer = client.read_answer();
  writer.join();
  EXPECT_EQ(body_of(answer), "POST /  " + body);
}

TEST(HttpServer, ChunkedRequest_IsRead) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  client.send("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
  EXPECT_EQ(body_of(client.read_answer()), "POST /  abcde");
}

TEST(HttpServer, Expect100_IsToldToContinue) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  client.send("POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
  EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.send("ok");
  EXPECT_EQ(body_of(client.read_answer()), "POST /  ok");
}

TEST(HttpServer, AbsoluteTarget_IsTakenByItsPath) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  client.send("GET http://host:1/p?q HTTP/1.1\r\n\r\n");
  EXPECT_EQ(body_of(client.read_answer()), "GET /p q ");
}

TEST(HttpServer, Head_HasLengthAndNoBody) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  client.send("HEAD /x HTTP/1.1\r\n\r\nGET /y HTTP/1.1\r\nConnection: close\r\n\r\n");
  const std::string all = client.read_to_end();
  const std::string second = body_of(all);
  EXPECT_NE(all.substr(0, all.size() - second.size()).find("Content-Length: 9\r\n"), std::string::npos);
  EXPECT_EQ(status_of(second), "HTTP/1.1 200 OK");
  EXPECT_EQ(body_of(second), "GET /y  ");
}

TEST(HttpServer, ConnectionClose_IsHonoured) {
  HttpServer server("127.0.0.1", 0, echo);
  for (const char* request : {"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"}) {
    RawClient client(server.port());
    client.send(request);
    const std::string answer = client.read_to_end();  // ends: the server closes
    EXPECT_EQ(body_of(answer), "GET /  ");
    EXPECT_NE(answer.find("Connection: close"), std::string::npos);
  }
}

TEST(HttpServer, HalfClosedClient_StillGetsItsAnswers) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  client.send(post("/", "1") + post("/", "2"));
  client.half_close();
  const std::string all = client.read_to_end();
  EXPECT_NE(all.find("POST /  1"), std::string::npos);
  EXPECT_NE(all.find("POST /  2"), std::string::npos);
}

TEST(HttpServer, Malformed_Gets4xxAndIsClosed) {
  HttpLimits limits;
  limits.max_header_bytes = 1024;
  limits.max_body_bytes = 1000;
  HttpServer server("127.0.0.1", 0, echo, limits);
  const std::string big(5000, 'a');
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"nonsense\r\n\r\n", "HTTP/1.1 400"},
      {"GET / HTTP/9.9\r\n\r\n", "HTTP/1.1 400"},
      {"GET / HTTP/1.1\r\nno colon\r\n\r\n", "HTTP/1.1 400"},
      {"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 400"},
      {"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "HTTP/1.1 400"},
      {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "HTTP/1.1 400"},
      {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + big, "HTTP/1.1 431"},
      {"GET / HTTP/1.1\r\nX: " + big + "\r\n\r\n", "HTTP/1.1 431"},
      {"GET /" + big, "HTTP/1.1 431"},
      {post("/", big), "HTTP/1.1 413"},
      {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + big, "HTTP/1.1 413"},
      {std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11), "HTTP/1.1 400"},
  };
  for (const auto& [request, status] : cases) {
    RawClient client(server.port());
    client.send(request);
    EXPECT_EQ(client.read_to_end().substr(0, 12), status) << request.substr(0, 80);
  }
  RawClient client(server.port());
  client.send(post("/", "half of it").substr(0, 50));
  client.half_close();
  EXPECT_EQ(client.read_to_end().substr(0, 12), "HTTP/1.1 400");
}

TEST(HttpServer, RefusedUpload_StillDeliversTheReason) {
  HttpServer server("127.0.0.1", 0, echo);
  RawClient client(server.port());
  const std::string body(4 * 1024 * 1024, 'a');
  std::thread writer([&] { client.send("POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + body); });
  EXPECT_EQ(client.read_answer().substr(0, 12), "HTTP/1.1 413");
  writer.join();
}

TEST(HttpServer, SlowRequest_TimesOut) {
  HttpLimits limits;
  limits.request_timeout = 1s;
  HttpServer server("127.0.0.1", 0, echo, limits);
  RawClient client(server.port());
  client.send("GET / HT");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(client.read_to_end().substr(0, 12), "HTTP/1.1 408");
  EXPECT_GE(std::chrono::steady_clock::now() - start, 900ms);
}

TEST(HttpServer, IdleConnection_IsClosed_AndOneBeingAnsweredIsNot) {
  HttpLimits limits;
  limits.idle_timeout = 1s;
  limits.request_timeout = 1s;
  Kept kept;
  HttpServer server("127.0.0.1", 0, kept.handler(), limits);
  RawClient busy(server.port());
  busy.send("GET / HTTP/1.1\r\n\r\n");
  RawClient idle(server.port());
  EXPECT_EQ(idle.read_to_end(), "");
  std::this_thread::sleep_for(1500ms);
  auto reply = kept.take();
  EXPECT_FALSE(reply->client_gone());
  reply->send(200, "text/plain", "late");
  EXPECT_EQ(body_of(busy.read_answer()), "late");
}

}  // namespace
}  // namespace kvrouter
