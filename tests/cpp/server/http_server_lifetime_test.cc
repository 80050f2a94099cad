#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "server/http_handlers.h"
#include "server/http_server.h"
#include "server/raw_client.h"

namespace kvrouter {
namespace {

using namespace std::chrono_literals;
using testing::body_of;
using testing::echo;
using testing::eventually;
using testing::Kept;
using testing::post;
using testing::RawClient;
using testing::status_of;

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
  const std::string refusal = third.read_to_end();
  EXPECT_EQ(status_of(refusal), "HTTP/1.1 503 Service Unavailable") << refusal;
  EXPECT_NE(body_of(refusal).find("has its 2 connections"), std::string::npos) << refusal;
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
