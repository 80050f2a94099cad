#include "server/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "server/raw_client.h"

namespace kvrouter {
namespace {

using namespace std::chrono_literals;
using testing::post;
using testing::RawClient;

void echo(HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
  reply->send(200, "text/plain", request.method + " " + request.path + " " + request.query + " " + request.body);
}

std::string status_of(const std::string& answer) {
  return answer.substr(0, answer.find("\r\n"));
}

std::string body_of(const std::string& answer) {
  const std::size_t at = answer.find("\r\n\r\n");
  return at == std::string::npos ? std::string() : answer.substr(at + 4);
}

// Replies kept by a handler for the test to answer.
class Kept {
 public:
  HttpHandler handler() {
    return [this](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
      std::lock_guard lock(mutex_);
      replies_.push_back(std::move(reply));
    };
  }
  std::shared_ptr<HttpReply> take() {
    for (int i = 0; i < 1000; ++i) {
      {
        std::lock_guard lock(mutex_);
        if (!replies_.empty()) {
          auto reply = std::move(replies_.front());
          replies_.erase(replies_.begin());
          return reply;
        }
      }
      std::this_thread::sleep_for(5ms);
    }
    throw std::runtime_error("no request came");
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<HttpReply>> replies_;
};

bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(5ms);
  return condition();
}

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

TEST(HttpServer, TooManyConnections_AreTurnedAway) {
  HttpLimits limits;
  limits.max_connections = 2;
  HttpServer server("127.0.0.1", 0, echo, limits);
  auto first = std::make_unique<RawClient>(server.port());
  RawClient second(server.port());
  for (auto* client : {first.get(), &second}) {
    client->send("GET / HTTP/1.1\r\n\r\n");
    client->read_answer();
  }
  RawClient third(server.port());
  EXPECT_EQ(third.read_to_end().substr(0, 12), "HTTP/1.1 503");
  first.reset();
  EXPECT_TRUE(eventually([&] {
    RawClient again(server.port());
    again.send("GET / HTTP/1.1\r\n\r\n");
    return again.read_answer().substr(0, 12) == "HTTP/1.1 200";
  }));
}

TEST(HttpServer, Stream_EachWriteLeavesAtOnce) {
  Kept kept;
  HttpServer server("127.0.0.1", 0, kept.handler());
  RawClient client(server.port());
  client.send("GET / HTTP/1.1\r\n\r\n");
  auto reply = kept.take();
  reply->begin_stream(200, "text/event-stream");
  EXPECT_NE(client.read_until("\r\n\r\n").find("Transfer-Encoding: chunked"), std::string::npos);
  for (int i = 0; i < 20; ++i) {
    reply->write("data: " + std::to_string(i % 10) + "\n\n");
    EXPECT_EQ(client.read_until("\n\n\r\n"), "9\r\ndata: " + std::to_string(i % 10) + "\n\n\r\n");
  }
  reply->write("");  // would end the stream if it were sent
  reply->end();
  EXPECT_EQ(client.read_until("\r\n\r\n"), "0\r\n\r\n");
  client.send("GET / HTTP/1.1\r\n\r\n");
  kept.take()->send(200, "text/plain", "next");
  EXPECT_EQ(body_of(client.read_answer()), "next");
}

TEST(HttpServer, StreamToHttp10_EndsWithTheConnection) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
    reply->begin_stream(200, "text/plain");
    reply->write("ab");
    reply->write("cd");
    reply->end();
  });
  RawClient client(server.port());
  client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  const std::string answer = client.read_to_end();
  EXPECT_EQ(body_of(answer), "abcd");
  EXPECT_EQ(answer.find("chunked"), std::string::npos);
}

TEST(HttpServer, ClientThatLeaves_IsNoticed_StreamingOrWaiting) {
  Kept kept;
  HttpServer server("127.0.0.1", 0, kept.handler());
  for (const bool streaming : {false, true}) {
    RawClient client(server.port());
    client.send("GET / HTTP/1.1\r\n\r\n");
    auto reply = kept.take();
    if (streaming) reply->begin_stream(200, "text/plain");
    std::this_thread::sleep_for(20ms);
    EXPECT_FALSE(reply->client_gone());
    client.close();
    EXPECT_TRUE(eventually([&] { return reply->client_gone(); }));
    reply->write("nobody reads this");
    reply->end();
  }
}

TEST(HttpServer, ClientThatDoesNotRead_IsCutOff) {
  HttpLimits limits;
  limits.max_unsent_bytes = 1024 * 1024;
  Kept kept;
  HttpServer server("127.0.0.1", 0, kept.handler(), limits);
  RawClient client(server.port());
  client.send("GET / HTTP/1.1\r\n\r\n");
  auto reply = kept.take();
  reply->begin_stream(200, "text/plain");
  for (int i = 0; i < 1000 && !reply->client_gone(); ++i) reply->write(std::string(64 * 1024, 'x'));
  EXPECT_TRUE(eventually([&] { return reply->client_gone(); }));
}

TEST(HttpServer, DroppedReply_Is500_AndDroppedStreamIsCut) {
  Kept kept;
  HttpServer server("127.0.0.1", 0, kept.handler());
  RawClient client(server.port());
  client.send("GET / HTTP/1.1\r\n\r\n");
  kept.take().reset();
  EXPECT_EQ(status_of(client.read_answer()), "HTTP/1.1 500 Internal Server Error");
  client.send("GET / HTTP/1.1\r\n\r\n");
  auto reply = kept.take();
  reply->begin_stream(200, "text/plain");
  reply->write("x");
  reply.reset();
  EXPECT_EQ(client.read_to_end().find("0\r\n\r\n"), std::string::npos);
}

TEST(HttpServer, HandlerThatThrows_Is500_AndTheServerLives) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    if (request.path == "/throw") throw std::runtime_error("no");
    echo(std::move(request), std::move(reply));
  });
  RawClient client(server.port());
  client.send("GET /throw HTTP/1.1\r\n\r\n");
  EXPECT_EQ(status_of(client.read_answer()), "HTTP/1.1 500 Internal Server Error");
  client.send("GET /fine HTTP/1.1\r\n\r\n");
  EXPECT_EQ(body_of(client.read_answer()), "GET /fine  ");
}

TEST(HttpServer, SecondAnswer_IsIgnored) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
    reply->send(200, "text/plain", "one");
    reply->send(200, "text/plain", "two");
    reply->begin_stream(200, "text/plain");
    reply->write("three");
    reply->end();
  });
  RawClient client(server.port());
  for (int i = 0; i < 3; ++i) {
    client.send("GET / HTTP/1.1\r\n\r\n");
    EXPECT_EQ(body_of(client.read_answer()), "one");
  }
}

TEST(HttpServer, Stop_ClosesConnections_AndRepliesOutliveIt) {
  Kept kept;
  std::shared_ptr<HttpReply> reply;
  auto server = std::make_unique<HttpServer>("127.0.0.1", 0, kept.handler());
  const std::uint16_t port = server->port();
  RawClient client(port);
  client.send("GET / HTTP/1.1\r\n\r\n");
  reply = kept.take();
  server->stop();
  server->stop();
  EXPECT_EQ(client.read_to_end(), "");
  EXPECT_TRUE(reply->client_gone());
  EXPECT_THROW(RawClient{port}, std::runtime_error);
  server.reset();
  reply->begin_stream(200, "text/plain");
  reply->write("x");
  reply->end();
  reply.reset();
  HttpServer again("127.0.0.1", port, echo);  // the address is free at once
  EXPECT_EQ(again.port(), port);
}

TEST(HttpServer, AddressTaken_ThrowsWithTheAddress) {
  HttpServer server("127.0.0.1", 0, echo);
  try {
    HttpServer second("127.0.0.1", server.port(), echo);
    FAIL() << "two servers on one port";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), std::errc::address_in_use);
    EXPECT_NE(std::string(error.what()).find("127.0.0.1:" + std::to_string(server.port())), std::string::npos);
  }
  EXPECT_THROW(HttpServer("no-such-host.invalid", 0, echo), std::system_error);
}

TEST(HttpServer, HostNames_AndLiterals_AreBound) {
  for (const char* host : {"localhost", "0.0.0.0", "*", "", "127.0.0.1"}) {
    HttpServer server(host, 0, echo);
    RawClient client(server.port());
    client.send("GET / HTTP/1.1\r\n\r\n");
    EXPECT_EQ(body_of(client.read_answer()), "GET /  ") << host;
  }
}

TEST(HttpServer, ManyThreadsAnswering_ManyClients) {
  std::mutex mutex;
  std::vector<std::thread> threads;
  HttpServer server("127.0.0.1", 0, [&](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    std::lock_guard lock(mutex);
    threads.emplace_back([request = std::move(request), reply = std::move(reply)] {
      reply->begin_stream(200, "text/plain");
      for (int i = 0; i < 5; ++i) reply->write(request.body);
      reply->end();
    });
  });
  std::vector<std::thread> clients;
  std::atomic<int> good{0};
  for (int c = 0; c < 8; ++c) {
    clients.emplace_back([&, c] {
      RawClient client(server.port());
      const std::string body = "client" + std::to_string(c);
      for (int i = 0; i < 25; ++i) {
        client.send(post("/", body));
        const std::string answer = client.read_until("0\r\n\r\n");
        std::size_t found = 0;
        for (std::size_t at = answer.find(body); at != std::string::npos; at = answer.find(body, at + 1)) ++found;
        if (found == 5) ++good;
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_EQ(good, 200);
  server.stop();
  for (auto& thread : threads) thread.join();
}

}  // namespace
}  // namespace kvrouter
