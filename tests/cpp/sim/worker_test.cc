#include "sim/worker.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#include <zmq.hpp>

#include "server/raw_client.h"

namespace kvrouter::sim {
namespace {

using namespace std::chrono_literals;
using kvrouter::testing::post;
using kvrouter::testing::RawClient;
using Json = nlohmann::json;

WorkerOptions quick() {
  WorkerOptions options;
  options.port = 0;
  options.time.scale = 0.01;
  return options;
}

std::string body_of(const std::string& answer) {
  return answer.substr(answer.find("\r\n\r\n") + 4);
}

std::string get(const Worker& worker, const std::string& path) {
  RawClient client(worker.port());
  client.send("GET " + path + " HTTP/1.1\r\n\r\n");
  return client.read_answer();
}

Json completed(const Worker& worker, const Json& request) {
  RawClient client(worker.port());
  client.send(post("/v1/completions", request.dump()));
  return Json::parse(body_of(client.read_answer()));
}

std::string reset(const Worker& worker, const std::string& query = "") {
  RawClient client(worker.port());
  client.send(post("/reset_prefix_cache" + query, ""));
  return body_of(client.read_answer());
}

double metric(const Worker& worker, const std::string& name) {
  const std::string page = get(worker, "/metrics");
  const std::size_t at = page.find("\n" + name + "{");
  if (at == std::string::npos) return -1;
  return std::stod(page.substr(page.find("} ", at) + 2));
}

bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(5ms);
  return condition();
}

std::vector<int> prompt(int length, int first = 3) {
  std::vector<int> result;
  for (int i = 0; i < length; ++i) result.push_back((first + i) % 1024);
  return result;
}

class Subscriber {
 public:
  explicit Subscriber(const std::string& endpoint) : socket_(context_, zmq::socket_type::sub) {
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::subscribe, "");
    socket_.set(zmq::sockopt::rcvtimeo, 5000);
    socket_.connect(endpoint);
  }
  std::vector<std::string> receive() {
    std::vector<std::string> frames;
    bool more = true;
    while (more) {
      zmq::message_t frame;
      if (!socket_.recv(frame)) return {};
      frames.push_back(frame.to_string());
      more = frame.more();
    }
    return frames;
  }

 private:
  zmq::context_t context_;
  zmq::socket_t socket_;
};

TEST(Worker, Completion_AnswersWithTokensAndHits) {
  Worker worker(quick());
  const Json request = {{"prompt", prompt(200)}, {"max_tokens", 4}, {"return_token_ids", true}};
  const Json first = completed(worker, request);
  EXPECT_EQ(first["choices"][0]["token_ids"].size(), 4U);
  EXPECT_EQ(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  const Json second = completed(worker, request);
  EXPECT_EQ(second["usage"]["prompt_tokens_details"]["cached_tokens"], 192);
  EXPECT_EQ(second["choices"][0]["token_ids"], first["choices"][0]["token_ids"]);
  EXPECT_EQ(metric(worker, "vllm:prefix_cache_queries_total"), 400);
  EXPECT_EQ(metric(worker, "vllm:prefix_cache_hits_total"), 192);
  EXPECT_EQ(metric(worker, "vllm:generation_tokens_total"), 8);
  EXPECT_NE(
      get(worker, "/metrics").find("vllm:cache_config_info{block_size=\"64\",engine=\"0\",num_gpu_blocks=\"448\"}"),
      std::string::npos);
}

TEST(Worker, Stream_SendsEachTokenAsItIsComputed) {
  WorkerOptions options = quick();
  options.time = {0.05, 0, 0, 0, 1.0};  // 50 ms a step
  Worker worker(options);
  RawClient client(worker.port());
  client.send(post(
      "/v1/completions",
      Json({{"prompt", prompt(10)}, {"max_tokens", 3}, {"stream", true}, {"stream_options", {{"include_usage", true}}}})
          .dump()));
  EXPECT_NE(client.read_until("\r\n\r\n").find("text/event-stream"), std::string::npos);
  std::vector<std::chrono::steady_clock::time_point> times;
  std::string all;
  for (int i = 0; i < 3; ++i) {
    all += client.read_until("\n\n\r\n");
    times.push_back(std::chrono::steady_clock::now());
  }
  EXPECT_GE(times[2] - times[0], 80ms);
  all += client.read_until("0\r\n\r\n");
  EXPECT_NE(all.find("\"usage\":{\"prompt_tokens\":10,"), std::string::npos);
  EXPECT_NE(all.find("data: [DONE]\n\n"), std::string::npos);
}

TEST(Worker, BadRequests_Get4xxInOpenAisForm) {
  WorkerOptions options = quick();
  options.scheduler.max_model_len = 100;
  Worker worker(options);
  EXPECT_EQ(completed(worker, {{"prompt", "x"}, {"max_tokens", 0}})["error"]["type"], "BadRequestError");
  const Json too_long = completed(worker, {{"prompt", prompt(90)}, {"max_tokens", 11}});
  EXPECT_EQ(too_long["error"]["code"], 400);
  EXPECT_NE(too_long["error"]["message"].get<std::string>().find("max_model_len 100"), std::string::npos);
  EXPECT_EQ(get(worker, "/nothing").substr(0, 12), "HTTP/1.1 404");
  EXPECT_EQ(get(worker, "/v1/completions").substr(0, 12), "HTTP/1.1 405");
  EXPECT_EQ(get(worker, "/health").substr(0, 12), "HTTP/1.1 200");
  EXPECT_EQ(Json::parse(body_of(get(worker, "/v1/models")))["data"][0]["id"], "sim");
}

TEST(Worker, ClientThatLeaves_CancelsItsRequest) {
  WorkerOptions options = quick();
  options.time = {0.01, 0, 0, 0, 1.0};
  Worker worker(options);
  for (const bool stream : {true, false}) {
    RawClient client(worker.port());
    client.send(
        post("/v1/completions", Json({{"prompt", prompt(100)}, {"max_tokens", 8000}, {"stream", stream}}).dump()));
    EXPECT_TRUE(eventually([&] { return metric(worker, "vllm:num_requests_running") == 1; }));
    client.close();
    EXPECT_TRUE(eventually([&] { return metric(worker, "vllm:num_requests_running") == 0; }));
    EXPECT_EQ(metric(worker, "vllm:kv_cache_usage_perc"), 0);
  }
}

TEST(Worker, Reset_EmptiesTheCache_AndIsRefusedWhileRequestsRun) {
  WorkerOptions options = quick();
  options.time = {0.01, 0, 0, 0, 1.0};
  Worker worker(options);
  const Json request = {{"prompt", prompt(130)}, {"max_tokens", 1}};
  completed(worker, request);
  EXPECT_EQ(reset(worker), "{\"success\":true}");
  EXPECT_EQ(completed(worker, request)["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  RawClient client(worker.port());
  client.send(post("/v1/completions", Json({{"prompt", prompt(10)}, {"max_tokens", 8000}}).dump()));
  EXPECT_TRUE(eventually([&] { return metric(worker, "vllm:num_requests_running") == 1; }));
  EXPECT_EQ(reset(worker), "{\"success\":false}");
  EXPECT_EQ(reset(worker, "?reset_running_requests=true"), "{\"success\":true}");
}

TEST(Worker, EventsAndLoad_ArePublished_AndEventsReplayed) {
  WorkerOptions options = quick();
  options.kv_events_endpoint = options.replay_endpoint = options.load_endpoint = "tcp://127.0.0.1:*";
  options.topic = "blocks";
  Worker worker(options);
  Subscriber events(worker.kv_events_endpoint());
  Subscriber load(worker.load_endpoint());
  // The idle message: by then the subscriptions have arrived.
  EXPECT_EQ(Json::parse(load.receive().at(0)),
            Json({{"kv_cache_usage", 0.0}, {"num_waiting_reqs", 0}, {"num_running_reqs", 0}}));
  completed(worker, {{"prompt", prompt(130)}, {"max_tokens", 2}});
  const auto stored = events.receive();
  ASSERT_EQ(stored.size(), 3U);
  EXPECT_EQ(stored[0], "blocks");
  EXPECT_EQ(stored[1], std::string(8, '\0'));
  const Json batch = Json::from_msgpack(stored[2]);
  EXPECT_EQ(batch[1][0]["type"], "BlockStored");
  EXPECT_EQ(batch[1][0]["block_hashes"].size(), 2U);
  EXPECT_EQ(batch[1][0]["token_ids"], Json(prompt(128)));
  const Json busy = Json::parse(load.receive().at(0));
  EXPECT_EQ(busy["num_running_reqs"], 1);
  EXPECT_GT(busy["kv_cache_usage"].get<double>(), 0);
  EXPECT_EQ(Json::parse(load.receive().at(0))["num_running_reqs"], 0);

  zmq::context_t context;
  zmq::socket_t dealer(context, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.set(zmq::sockopt::rcvtimeo, 5000);
  dealer.connect(worker.replay_endpoint());
  dealer.send(zmq::message_t(), zmq::send_flags::sndmore);
  dealer.send(zmq::buffer(std::string(8, '\0')), zmq::send_flags::none);
  std::vector<std::string> frames;
  for (int i = 0; i < 8; ++i) {
    zmq::message_t frame;
    ASSERT_TRUE(dealer.recv(frame));
    frames.push_back(frame.to_string());
  }
  EXPECT_EQ(frames, (std::vector<std::string>{"", "blocks", stored[1], stored[2], "", "", std::string(8, '\xff'), ""}));
}

TEST(Worker, ResetIsTold_WithTheNextBatch) {
  WorkerOptions options = quick();
  options.kv_events_endpoint = options.load_endpoint = "tcp://127.0.0.1:*";
  Worker worker(options);
  Subscriber events(worker.kv_events_endpoint());
  Subscriber load(worker.load_endpoint());
  load.receive();
  completed(worker, {{"prompt", prompt(64)}, {"max_tokens", 1}});
  EXPECT_EQ(Json::from_msgpack(events.receive()[2])[1].size(), 1U);
  reset(worker);
  completed(worker, {{"prompt", prompt(64)}, {"max_tokens", 1}});
  const Json batch = Json::from_msgpack(events.receive()[2])[1];
  ASSERT_EQ(batch.size(), 2U);
  EXPECT_EQ(batch[0]["type"], "AllBlocksCleared");
  EXPECT_EQ(batch[1]["type"], "BlockStored");
}

TEST(Worker, ManyClientsAtOnce_AreAllServed) {
  WorkerOptions options = quick();
  options.time.scale = 0;
  options.blocks.num_blocks = 40;
  options.scheduler.max_model_len = 2000;
  Worker worker(options);
  std::vector<std::thread> clients;
  std::atomic<int> good{0};
  for (int c = 0; c < 8; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 20; ++i) {
        const Json answer = completed(worker, {{"prompt", prompt(500 + 10 * i, 100 * c)}, {"max_tokens", 70}});
        if (answer["usage"]["completion_tokens"] == 70) ++good;
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_EQ(good, 160);
  EXPECT_EQ(metric(worker, "vllm:kv_cache_usage_perc"), 0);
}

TEST(Worker, Stop_DropsWhatRuns_AndFreesTheAddresses) {
  WorkerOptions options = quick();
  options.time = {5.0, 0, 0, 0, 1.0};  // in the middle of a long step
  options.kv_events_endpoint = options.load_endpoint = "tcp://127.0.0.1:*";
  auto worker = std::make_unique<Worker>(options);
  RawClient client(worker->port());
  client.send(post("/v1/completions", Json({{"prompt", prompt(10)}}).dump()));
  std::this_thread::sleep_for(50ms);
  const auto start = std::chrono::steady_clock::now();
  worker->stop();
  worker->stop();
  EXPECT_LT(std::chrono::steady_clock::now() - start, 1s);
  options.port = worker->port();
  options.kv_events_endpoint = worker->kv_events_endpoint();
  options.load_endpoint = worker->load_endpoint();
  EXPECT_TRUE(eventually([&] {
    try {
      Worker again(options);
      return true;
    } catch (const std::runtime_error&) {
      return false;  // ZMQ closes its sockets in the background
    }
  }));
}

TEST(Worker, AddressTaken_IsToldWithTheOptionsName) {
  WorkerOptions options = quick();
  options.load_endpoint = "tcp://127.0.0.1:*";
  Worker worker(options);
  const auto message = [](const WorkerOptions& same) {
    try {
      Worker second(same);
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  WorkerOptions same = quick();
  same.port = worker.port();
  EXPECT_EQ(message(same).rfind("port: cannot listen on 127.0.0.1:" + std::to_string(same.port), 0), 0U);
  same = quick();
  same.load_endpoint = worker.load_endpoint();
  EXPECT_EQ(message(same).rfind("load_endpoint: cannot bind " + same.load_endpoint, 0), 0U);
}

TEST(Worker, DebugBlocks_NamesWhatTheEventsSaidIsStored_OnlyWhenSwitchedOn) {
  WorkerOptions options = quick();
  EXPECT_NE(get(Worker(options), "/debug/blocks").find(" 404 "), std::string::npos);
  options.debug = true;
  options.kv_events_endpoint = "tcp://127.0.0.1:*";
  Worker worker(options);
  EXPECT_EQ(body_of(get(worker, "/debug/blocks")), R"({"batches":0,"blocks":[],"told_removed":[]})");
  completed(worker, {{"prompt", prompt(129)}, {"max_tokens", 1}});
  const Json held = Json::parse(body_of(get(worker, "/debug/blocks")));
  EXPECT_EQ(held["blocks"].size(), 2u);
  EXPECT_EQ(held["batches"], 1);
}

}  // namespace
}  // namespace kvrouter::sim
