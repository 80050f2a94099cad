// The service in front of workers that do as they are told.
#include "server/service.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "server/http_handlers.h"
#include "server/raw_client.h"

namespace kvrouter {
namespace {

using testing::RawClient;

// Answers what the service asks every worker by itself, and hands the rest to the test.
HttpHandler worker_handler(HttpHandler handler, HttpHandler health) {
  return [handler = std::move(handler), health = std::move(health)](HttpRequest&& request,
                                                                    std::shared_ptr<HttpReply> reply) {
    if (request.path == "/health") return health(std::move(request), std::move(reply));
    if (request.path == "/metrics")
      return reply->send(200, "text/plain", "vllm:cache_config_info{block_size=\"4\"} 1\n");
    if (request.path == "/v1/models") return reply->send(200, "application/json", R"({"data": [{"id": "m"}]})");
    handler(std::move(request), std::move(reply));
  };
}

class ServiceTest : public ::testing::Test {
 protected:
  ServiceTest() : router_(router_options()) { router_.start(); }

  static RouterOptions router_options() {
    RouterOptions options;
    options.block_size = 4;
    options.workers.resize(4);
    return options;
  }

  void serve(const std::vector<HttpHandler>& handlers) {
    ServiceOptions options;
    options.port = 0;
    options.fleet = fleet_options_;
    options.fleet.health_interval = std::chrono::milliseconds(20);
    options.fleet.breaker = {100, std::chrono::milliseconds(100)};
    for (const HttpHandler& handler : handlers) {
      workers_.push_back(std::make_unique<HttpServer>("127.0.0.1", 0, worker_handler(handler, health())));
      options.workers.push_back({"http://127.0.0.1:" + std::to_string(workers_.back()->port()), "", "", ""});
    }
    service_ = std::make_unique<Service>(router_, options);
    for (std::size_t w = 0; w < handlers.size(); ++w) {
      wait_for([&] {
        const auto worker = workers().at(w);
        return worker.at("healthy") == true && !worker.at("models").empty();
      });
    }
  }

  HttpHandler health() {
    return [this](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
      if (!silent_) return reply->send(200, "application/json", "");
      ++probes_left_open_;
      const std::lock_guard lock(open_mutex_);
      open_.push_back(std::move(reply));
    };
  }

  std::string ask(const std::string& request) {
    RawClient client(service_->port());
    client.send(request);
    return client.read_to_end();
  }
  static std::string post(const std::string& path, const std::string& body) {
    return "POST " + path + " HTTP/1.1\r\nConnection: close\r\nContent-Length: " + std::to_string(body.size()) +
           "\r\n\r\n" + body;
  }
  static std::string get(const std::string& path) { return "GET " + path + " HTTP/1.1\r\nConnection: close\r\n\r\n"; }
  nlohmann::json workers() { return nlohmann::json::parse(testing::body_of(ask(get("/workers")))).at("workers"); }

  template <typename Condition>
  static void wait_for(Condition condition) {
    bool met = condition();  // asked no more once it holds, as some have effects
    for (int i = 0; i < 2000 && !met; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      met = condition();
    }
    ASSERT_TRUE(met);
  }

  Router router_;
  FleetOptions fleet_options_;
  std::atomic<bool> silent_{false};  // workers leave /health unanswered
  std::atomic<int> probes_left_open_{0};
  std::mutex open_mutex_;
  std::vector<std::shared_ptr<HttpReply>> open_;
  std::vector<std::unique_ptr<HttpServer>> workers_;
  std::unique_ptr<Service> service_;
};

void complete(HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
  reply->send(200, "application/json", R"({"path": ")" + request.path + R"("})");
}

TEST_F(ServiceTest, PassesRequestsOn) {
  serve({complete, complete});
  for (int i = 0; i < 20; ++i) {
    const std::string answer = ask(post("/v1/completions", R"({"model": "m", "prompt": [1, 2, 3, 4, 5]})"));
    EXPECT_EQ(testing::status_of(answer), "HTTP/1.1 200 OK");
    EXPECT_NE(answer.find("x-kvrouter-worker: http://127.0.0.1:"), std::string::npos);
    EXPECT_EQ(testing::body_of(answer), R"({"path": "/v1/completions"})");
  }
  EXPECT_EQ(router_.status().decisions, 20u);
}

TEST_F(ServiceTest, AWorkerThatIsLateWithItsHealth_IsStillSentTo) {
  fleet_options_.health_timeout = std::chrono::milliseconds(20);
  fleet_options_.unanswered_probes = 1'000'000;
  serve({complete});
  silent_ = true;
  wait_for([&] { return probes_left_open_ > 5; });
  EXPECT_EQ(workers().at(0).at("healthy"), true);
  EXPECT_EQ(testing::status_of(ask(post("/v1/completions", R"({"prompt": [1]})"))), "HTTP/1.1 200 OK");
}

TEST_F(ServiceTest, AWorkerThatIsSilentForLong_IsDownUntilItAnswers) {
  fleet_options_.health_timeout = std::chrono::milliseconds(20);
  fleet_options_.unanswered_probes = 10;
  serve({complete});
  silent_ = true;
  wait_for([&] { return workers().at(0).at("healthy") == false; });
  EXPECT_GE(probes_left_open_, 10);
  EXPECT_EQ(testing::status_of(ask(get("/ready"))), "HTTP/1.1 503 Service Unavailable");
  silent_ = false;
  wait_for([&] { return workers().at(0).at("healthy") == true; });
}

TEST_F(ServiceTest, StreamsAndBrokenStreams) {
  serve({[](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    reply->begin_stream(200, "text/event-stream");
    for (int i = 0; i < 5; ++i) reply->write("data: " + std::to_string(i) + "\n\n");
    if (request.path == "/v1/completions") reply->end();  // else dropped: the connection is cut
  }});
  const std::string whole = ask(post("/v1/completions", R"({"prompt": [1]})"));
  EXPECT_NE(whole.find("data: 4\n\n"), std::string::npos);
  EXPECT_EQ(whole.find("error"), std::string::npos);
  // What the worker had not sent when it cut the connection is lost; the client is told.
  const std::string broken = ask(post("/v1/chat/completions", R"({"messages": []})"));
  EXPECT_NE(broken.find("data: {\"error\""), std::string::npos);
}

TEST_F(ServiceTest, AWorkersFailure_IsTriedAtAnother) {
  std::atomic<int> failed{0};
  const auto fail = [&](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
    ++failed;
    reply->send(503, "text/plain", "no");
  };
  serve({fail, complete});
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(testing::status_of(ask(post("/v1/completions", R"({"prompt": [1]})"))), "HTTP/1.1 200 OK");
  }
  EXPECT_GT(failed, 0);
}

TEST_F(ServiceTest, AClientThatGoes_IsToldToTheWorker) {
  testing::Kept kept;
  serve({kept.handler()});
  std::shared_ptr<HttpReply> reply;
  {
    RawClient client(service_->port());
    client.send(post("/v1/completions", R"({"prompt": [1]})"));
    reply = kept.take();
  }
  wait_for([&] { return reply->client_gone(); });
  wait_for([&] { return workers().at(0).at("in_flight") == 0; });
}

TEST_F(ServiceTest, StopsWithRequestsUnderWay) {
  testing::Kept kept;
  serve({kept.handler()});
  RawClient client(service_->port());
  client.send(post("/v1/completions", R"({"prompt": [1]})"));
  const std::shared_ptr<HttpReply> reply = kept.take();
  service_->stop();
  EXPECT_EQ(client.read_some(), "");
}

TEST_F(ServiceTest, WorkersComeAndGo_UnderTraffic) {
  serve({complete, complete});
  std::atomic<bool> done{false};
  std::atomic<int> served{0};
  std::thread traffic([&] {
    while (!done) {
      if (testing::status_of(ask(post("/v1/completions", R"({"prompt": [1, 2, 3, 4]})"))) == "HTTP/1.1 200 OK")
        ++served;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // a connection each, and local ports are finite
    }
  });
  const std::string url = "http://127.0.0.1:" + std::to_string(workers_[1]->port());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(testing::status_of(ask("DELETE /workers/1 HTTP/1.1\r\nConnection: close\r\n\r\n")), "HTTP/1.1 200 OK");
    wait_for([&] {
      const std::string answer =
          ask(post("/workers", "{\"url\": \"" + url + "\", \"kv_events\": \"tcp://127.0.0.1:1\"}"));
      return testing::status_of(answer) == "HTTP/1.1 201 Created";
    });
  }
  const int before = served;
  wait_for([&] { return served > before; });
  done = true;
  traffic.join();
  EXPECT_EQ(workers().size(), 2u);
}

}  // namespace
}  // namespace kvrouter
