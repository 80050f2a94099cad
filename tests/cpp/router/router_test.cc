#include "kvrouter/router.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <optional>
#include <thread>

#include "events/batch_builder.h"
#include "router/fake_publisher.h"
#include "router/latency_histogram.h"
#include "server/http_server.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::cleared_map;
using testing::eventually;
using testing::Publisher;
using testing::stored_map;
using testing::StoredFields;
using namespace std::chrono_literals;

constexpr std::size_t kBlock = 4;
const std::vector<TokenId> kTokens = {1, 2, 3, 4, 5, 6, 7, 8};

std::string stored_batch() {
  return batch_of({stored_map({{11, 12}, std::nullopt, {1, 2, 3, 4, 5, 6, 7, 8}, kBlock})});
}

RouterOptions options_for(std::size_t num_workers) {
  RouterOptions options;
  options.block_size = kBlock;
  options.workers.resize(num_workers);
  return options;
}

TEST(Router, Options_AreChecked) {
  EXPECT_THROW(Router(options_for(0)), std::invalid_argument);
  RouterOptions options = options_for(1);
  options.block_size = 0;
  EXPECT_THROW(Router{options}, std::invalid_argument);
  options = options_for(1);
  options.policy = "fastest";
  try {
    Router router(options);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("linear"), std::string::npos) << error.what();
  }
  options = options_for(1);
  options.workers[0].http = "nonsense";
  EXPECT_THROW(Router{options}, std::invalid_argument);
}

TEST(Router, ChosenWorker_WaitsForOneMoreUntilItsNextWord) {
  RouterOptions options = options_for(2);
  Router router(options);
  router.loads().update(0, {0.5, 0, 0});
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 1u);  // idle and empty
  EXPECT_EQ(router.loads().get(1).waiting, 1);
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 0u);  // -0.5 against -1
  router.loads().update(1, {0, 0, 0});
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 1u);
}

TEST(Router, DecisionForSomeWorkers_KeepsTheAccountOfTheOthers) {
  RouterOptions options = options_for(2);
  options.policy = "least_loaded";
  Router router(options);
  const std::vector<LocalHash> none;
  const std::vector<std::uint8_t> only[] = {{1, 0}, {0, 1}};
  for (int i = 0; i < 2; ++i) EXPECT_EQ(router.explain({none, 8, only[1]}).choice.worker, 1u);
  EXPECT_EQ(router.explain({none, 8, only[0]}).choice.worker, 0u);
  EXPECT_EQ(router.explain(none, 8).choice.worker, 0u);  // one in flight against two
  EXPECT_EQ(router.status().account.requests, 4u);
}

TEST(Router, Explain_GivesEveryWorkersScore) {
  Router router(options_for(2));
  router.loads().update(0, {0.25, 2, 0});
  const std::vector<StoredBlock> blocks = {{hash_block(std::span(kTokens).subspan(0, 4)), 11}};
  router.index().store(0, std::nullopt, blocks);
  std::vector<LocalHash> hashes(2);
  hash_blocks(kTokens, kBlock, 0, hashes);
  const Decision decision = router.explain(hashes, 8);
  EXPECT_EQ(decision.choice.worker, 1u);
  EXPECT_EQ(decision.scores, (std::vector<double>{2 * 0.5 - 0.25 - 1, 0}));
  EXPECT_EQ(decision.overlap_blocks, (std::vector<std::uint32_t>{1, 0}));
  EXPECT_EQ(decision.loads[0], (WorkerLoad{0.25, 2, 0}));
  EXPECT_EQ(decision.num_blocks, 2u);
}

TEST(Router, SameSeed_SameChoices) {
  const auto choices = [](std::uint64_t seed) {
    RouterOptions options = options_for(8);
    options.seed = seed;
    Router router(options);
    std::vector<WorkerId> workers;
    for (int i = 0; i < 50; ++i) workers.push_back(router.choose_for_tokens(kTokens).worker);
    return workers;
  };
  EXPECT_EQ(choices(1), choices(1));
  EXPECT_NE(choices(1), choices(2));
}

TEST(Router, RoundRobin_TakesTurnsAndCounts) {
  Router router(options_for(3));
  for (WorkerId i = 0; i < 6; ++i) EXPECT_EQ(router.round_robin(), i % 3);
  EXPECT_EQ(router.status().decisions, 6u);
  EXPECT_EQ(router.status().workers[2].decisions, 2u);
}

// A router that listens to workers which speak on real sockets.
class RouterOnSockets : public ::testing::Test {
 protected:
  struct Worker {
    std::optional<Publisher> kv, load;
  };

  // `kv` and `load`: which of the two publishers each worker has.
  void add_worker(bool kv = true, bool load = true) {
    Worker& worker = workers_.emplace_back();
    WorkerEndpoints endpoints;
    if (kv) worker.kv.emplace(zmq_);
    if (load) worker.load.emplace(zmq_);
    endpoints.kv_events = kv ? worker.kv->endpoint() : unused_endpoint();
    endpoints.load = load ? worker.load->endpoint() : unused_endpoint();
    options_.workers.push_back(endpoints);
  }

  void start() {
    options_.block_size = kBlock;
    options_.startup_grace = 100ms;
    router_.emplace(options_);
    router_->start();
    ASSERT_TRUE(eventually([&] {
      const RouterStatus status = router_->status();
      return std::all_of(status.workers.begin(), status.workers.end(),
                         [](const WorkerStatus& w) { return w.state == WorkerState::kUp; });
    }));
  }

  // A batch that arrives: publishers drop what they send before a subscription is there.
  void send_until_seen(std::size_t worker, const std::string& payload) {
    const std::uint64_t before = router_->status().workers[worker].events.batches;
    ASSERT_TRUE(eventually([&] {
      workers_[worker].kv->send_batch(sequence_++, payload);
      std::this_thread::sleep_for(5ms);
      return router_->status().workers[worker].events.batches > before;
    }));
  }

  // The same for a worker that has been heard before: sent once.
  void send(std::size_t worker, const std::string& payload) {
    const std::uint64_t before = router_->status().workers[worker].events.batches;
    workers_[worker].kv->send_batch(sequence_++, payload);
    ASSERT_TRUE(eventually([&] { return router_->status().workers[worker].events.batches > before; }));
  }

  std::string unused_endpoint() { return unused_.emplace_back().endpoint(); }

  std::vector<std::string> notices(std::chrono::milliseconds quiet = 300ms) {
    std::vector<std::string> texts;
    while (const auto notice = router_->next_notice(quiet)) {
      if (notice->level != RouterNotice::Level::kInfo) texts.push_back(notice->text);
    }
    return texts;
  }

  zmq::context_t zmq_;
  std::vector<Worker> workers_;
  std::deque<testing::UnusedPort> unused_;
  RouterOptions options_;
  std::optional<Router> router_;
  std::uint64_t sequence_ = 0;
};

TEST_F(RouterOnSockets, KvEvents_DecideTheChoice) {
  add_worker();
  add_worker();
  start();
  send_until_seen(1, stored_batch());
  ASSERT_TRUE(eventually([&] { return router_->status().workers[1].cached_blocks == 2; }));
  for (int i = 0; i < 3; ++i) {
    const Choice choice = router_->choose_for_tokens(kTokens);
    EXPECT_EQ(choice.worker, 1u);
    EXPECT_EQ(choice.overlap_blocks, 2u);
    router_->loads().update(1, {});
  }
  router_->reset(1);
  EXPECT_EQ(router_->status().workers[1].cached_blocks, 0u);
}

TEST_F(RouterOnSockets, ResetUntilCleared_BelievesNoLateStore) {
  add_worker();
  add_worker();
  start();
  const auto held = [&] { return router_->status().workers[1].cached_blocks; };
  send_until_seen(1, stored_batch());
  ASSERT_TRUE(eventually([&] { return held() == 2; }));
  router_->reset(std::nullopt, Router::Reset::kUntilCleared);
  EXPECT_EQ(held(), 0u);
  send(1, stored_batch());  // published before the cache was emptied
  EXPECT_EQ(held(), 0u);
  EXPECT_EQ(router_->choose_for_tokens(kTokens).overlap_blocks, 0u);
  // One batch, as vLLM sends it: the last of the old cache, the word that it is cleared, the first of the new one.
  const StoredFields old_blocks{
      .hashes = {11, 12}, .parent = {}, .tokens = {1, 2, 3, 4, 5, 6, 7, 8}, .block_size = kBlock};
  const StoredFields new_blocks{.hashes = {11}, .parent = {}, .tokens = {1, 2, 3, 4}, .block_size = kBlock};
  send(1, batch_of({stored_map(old_blocks), cleared_map(), stored_map(new_blocks)}));
  EXPECT_TRUE(eventually([&] { return held() == 1; }));
}

TEST_F(RouterOnSockets, ResetUntilCleared_WaitsForAsManyAsWereAsked) {
  add_worker();
  start();
  const auto held = [&] { return router_->status().workers[0].cached_blocks; };
  send_until_seen(0, stored_batch());
  router_->reset(0, Router::Reset::kUntilCleared);
  router_->reset(0, Router::Reset::kUntilCleared);
  send(0, batch_of({cleared_map()}));  // of the first
  send(0, stored_batch());
  EXPECT_EQ(held(), 0u);
  send(0, batch_of({cleared_map()}));
  send(0, stored_batch());
  EXPECT_TRUE(eventually([&] { return held() == 2; }));
}

TEST_F(RouterOnSockets, ResetUntilCleared_EndsWithAGapOrAResetWithoutIt) {
  add_worker();
  start();
  const auto held = [&] { return router_->status().workers[0].cached_blocks; };
  send_until_seen(0, stored_batch());
  router_->reset(0, Router::Reset::kUntilCleared);
  router_->reset(0);  // the worker did not clear its cache
  send(0, stored_batch());
  EXPECT_TRUE(eventually([&] { return held() == 2; }));
  router_->reset(0, Router::Reset::kUntilCleared);
  ++sequence_;  // lost, and with it what it said
  send(0, stored_batch());
  EXPECT_TRUE(eventually([&] { return held() == 2; }));
}

TEST(Router, ResetUntilCleared_WithoutAConnectionIsAReset) {
  Router router(options_for(1));
  router.reset(0, Router::Reset::kUntilCleared);
  const std::vector<StoredBlock> blocks = {{hash_block(std::span(kTokens).subspan(0, 4)), 11}};
  router.index().store(0, std::nullopt, blocks);
  EXPECT_EQ(router.choose_for_tokens(kTokens).overlap_blocks, 1u);
}

TEST_F(RouterOnSockets, LoadMessages_TheNewestCounts) {
  add_worker();
  start();
  ASSERT_TRUE(eventually([&] {
    for (int i = 0; i < 500; ++i) {  // fewer than a publisher's queue holds: what it drops is no fault of the reader's
      workers_[0].load->send_load(R"({"kv_cache_usage": 0.1, "num_waiting_reqs": )" + std::to_string(i) + "}");
    }
    workers_[0].load->send_load(R"({"kv_cache_usage": 0.75, "num_waiting_reqs": 7})");
    std::this_thread::sleep_for(20ms);
    return router_->loads().get(0) == WorkerLoad{0.75, 7, 0};
  }));
  EXPECT_EQ(router_->status().workers[0].load_source, LoadSource::kMessages);
}

TEST_F(RouterOnSockets, WorkerThatDies_IsToldOnceAndLeftOutUntilItIsBack) {
  add_worker();
  add_worker();
  start();
  send_until_seen(1, stored_batch());
  const std::string kv = workers_[1].kv->endpoint(), load = workers_[1].load->endpoint();
  workers_[1].load.reset();
  workers_[1].kv.reset();
  ASSERT_TRUE(eventually([&] { return router_->status().workers[1].state == WorkerState::kDown; }));
  EXPECT_EQ(router_->status().workers[1].cached_blocks, 0u);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(router_->choose_for_tokens(kTokens).worker, 0u);
    EXPECT_EQ(router_->round_robin(), 0u);
  }
  const std::vector<std::string> told = notices(1000ms);
  ASSERT_EQ(told.size(), 1u) << told[1];
  EXPECT_NE(told[0].find("worker 1 is gone"), std::string::npos) << told[0];

  workers_[1].kv.emplace(zmq_, kv);
  workers_[1].load.emplace(zmq_, load);
  ASSERT_TRUE(eventually([&] { return router_->status().workers[1].state == WorkerState::kUp; }));
  sequence_ = 0;
  send_until_seen(1, stored_batch());
  EXPECT_TRUE(eventually([&] { return router_->choose_for_tokens(kTokens).worker == 1; }));
}

// With ZMQ_CONFLATE libzmq would end the process.
TEST_F(RouterOnSockets, LoadMessageOfSeveralParts_IsMalformedAndTheNextOneCounts) {
  add_worker();
  start();
  ASSERT_TRUE(eventually([&] {
    workers_[0].load->send_frames({"kv", "12345678", "payload"});
    std::this_thread::sleep_for(5ms);
    return router_->status().workers[0].malformed_load_messages > 0;
  }));
  ASSERT_TRUE(eventually([&] {
    workers_[0].load->send_load(R"({"kv_cache_usage": 0.25, "num_waiting_reqs": 3})");
    std::this_thread::sleep_for(5ms);
    return router_->loads().get(0) == WorkerLoad{0.25, 3, 0};
  }));
}

// libzmq gives up for good on a peer that breaks its protocol.
TEST_F(RouterOnSockets, PortThatAnotherProgramHadMeanwhile_IsHeardAgain) {
  add_worker();
  start();
  send_until_seen(0, stored_batch());
  const std::string kv = workers_[0].kv->endpoint();
  workers_[0].kv.reset();
  {
    zmq::socket_t other(zmq_, zmq::socket_type::rep);  // no publisher
    other.set(zmq::sockopt::linger, 0);
    zmq::socket_t monitor(zmq_, zmq::socket_type::pair);
    ASSERT_EQ(zmq_socket_monitor(other.handle(), "inproc://other", ZMQ_EVENT_ACCEPTED), 0);
    monitor.connect("inproc://other");
    monitor.set(zmq::sockopt::rcvtimeo, 10'000);
    ASSERT_TRUE(eventually([&] { return zmq_bind(other.handle(), kv.c_str()) == 0; }));
    zmq::message_t event;
    ASSERT_TRUE(monitor.recv(event).has_value());  // the router has tried it
    std::this_thread::sleep_for(100ms);
    monitor.close();
  }
  workers_[0].kv.emplace(zmq_, kv);
  sequence_ = 0;
  send_until_seen(0, stored_batch());
  EXPECT_TRUE(eventually([&] { return router_->status().workers[0].cached_blocks == 2; }));
}

TEST_F(RouterOnSockets, AllWorkersGone_SomeoneIsStillChosen) {
  add_worker();
  start();
  workers_.clear();
  ASSERT_TRUE(eventually([&] { return router_->status().workers[0].state == WorkerState::kDown; }));
  EXPECT_EQ(router_->choose_for_tokens(kTokens).worker, 0u);
  EXPECT_EQ(router_->round_robin(), 0u);
}

TEST_F(RouterOnSockets, NoLoadPublisher_IsToldOnce) {
  add_worker(true, false);
  start();
  const std::vector<std::string> told = notices();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_NE(told[0].find("publishes no load"), std::string::npos) << told[0];
  EXPECT_EQ(router_->choose_for_tokens(kTokens).worker, 0u);
}

TEST_F(RouterOnSockets, NoKvEvents_IsToldOnce) {
  add_worker(false, true);
  start();
  const std::vector<std::string> told = notices();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_NE(told[0].find("publishes no KV events"), std::string::npos) << told[0];
  EXPECT_EQ(router_->choose_for_tokens(kTokens).worker, 0u);
}

TEST_F(RouterOnSockets, NobodyThere_IsToldOnceAndRequestsStillGetAWorker) {
  options_.workers = {{unused_endpoint(), unused_endpoint(), ""}, {unused_endpoint(), unused_endpoint(), ""}};
  options_.block_size = kBlock;
  options_.startup_grace = 50ms;
  router_.emplace(options_);
  router_->start();
  EXPECT_EQ(notices(500ms).size(), 2u);
  std::map<WorkerId, int> chosen;
  for (int i = 0; i < 10; ++i) ++chosen[router_->choose_for_tokens(kTokens).worker];
  EXPECT_EQ(chosen[0], 5);
  EXPECT_EQ(chosen[1], 5);
}

TEST_F(RouterOnSockets, OtherBlockSize_IsSaidLoudly) {
  add_worker();
  start();
  send_until_seen(0, batch_of({stored_map({{1}, std::nullopt, {1, 2}, 2})}));
  const std::vector<std::string> told = notices();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_NE(told[0].find("blocks of 2 tokens, the router's block_size is 4"), std::string::npos) << told[0];
}

TEST_F(RouterOnSockets, Gap_IsCountedToldAndForgets) {
  add_worker();
  start();
  send_until_seen(0, stored_batch());
  ASSERT_TRUE(eventually([&] { return router_->status().workers[0].cached_blocks == 2; }));
  workers_[0].kv->send_batch(sequence_ + 5, batch_of({}));
  ASSERT_TRUE(eventually([&] { return router_->status().workers[0].gaps == 1; }));
  EXPECT_EQ(router_->status().workers[0].missed_batches, 5u);
  EXPECT_EQ(router_->status().workers[0].cached_blocks, 0u);
  const std::vector<std::string> told = notices();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_NE(told[0].find("gap"), std::string::npos) << told[0];
}

TEST_F(RouterOnSockets, HostileMessages_CostNothingElse) {
  add_worker();
  add_worker();
  start();
  send_until_seen(1, stored_batch());
  ASSERT_TRUE(eventually([&] {
    Publisher& kv = *workers_[0].kv;
    kv.send_frames({"kv"});
    kv.send_frames({"kv", "short", "x"});
    kv.send_frames({"kv", "12345678", "x", "too", "many"});
    kv.send_batch(UINT64_MAX, std::string(1000, '\xff'));
    workers_[0].load->send_load("{\"kv_cache_usage\": 1e9}");
    std::this_thread::sleep_for(5ms);
    const RouterStatus status = router_->status();
    return status.workers[0].events.malformed_batches > 0 && status.workers[0].malformed_load_messages > 0;
  }));
  EXPECT_EQ(router_->status().workers[1].cached_blocks, 2u);
  EXPECT_EQ(notices().size(), 2u);  // one of events, one of load
}

TEST_F(RouterOnSockets, NoLoadPublisher_MetricsAreRead) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
    reply->send(200, "text/plain", "vllm:kv_cache_usage_perc 0.5\nvllm:num_requests_waiting 3\n");
  });
  add_worker(true, false);
  options_.workers[0].http = "http://127.0.0.1:" + std::to_string(server.port());
  options_.metrics_interval = 10ms;
  start();
  EXPECT_TRUE(eventually([&] { return router_->loads().get(0) == WorkerLoad{0.5, 3, 0}; }));
  EXPECT_TRUE(eventually([&] { return router_->status().workers[0].load_source == LoadSource::kMetrics; }));
  EXPECT_EQ(notices().size(), 1u);
}

TEST_F(RouterOnSockets, StartAndStop_AreIdempotentAndRepeatable) {
  add_worker();
  start();
  for (int i = 0; i < 3; ++i) {
    router_->start();
    router_->start();
    EXPECT_TRUE(router_->running());
    router_->stop();
    router_->stop();
    EXPECT_FALSE(router_->running());
    EXPECT_EQ(router_->choose_for_tokens(kTokens).worker, 0u);
  }
}

TEST_F(RouterOnSockets, DecisionsWhileStartingStoppingAndResetting) {
  add_worker();
  add_worker();
  start();
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      while (!stop) {
        router_->choose_for_tokens(kTokens);
        router_->round_robin();
        router_->status();
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) workers_[0].kv->send_batch(sequence_++, stored_batch());
  });
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(20ms);
    router_->reset();
    router_->stop();
    router_->start();
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST_F(RouterOnSockets, BadEndpoint_IsAClearError) {
  options_.workers = {{"tcp://", "", ""}};
  router_.emplace(options_);
  try {
    router_->start();
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("worker 0"), std::string::npos) << error.what();
  }
  EXPECT_FALSE(router_->running());
}

TEST(LatencyHistogram, PercentilesAreCloseToTheTruth) {
  LatencyHistogram histogram;
  EXPECT_EQ(histogram.percentile(0.5), 0);
  for (std::uint64_t i = 1; i <= 100'000; ++i) histogram.record(i);
  EXPECT_EQ(histogram.count(), 100'000u);
  for (const double q : {0.01, 0.5, 0.9, 0.99}) {
    EXPECT_NEAR(histogram.percentile(q) / (q * 100'000), 1.0, 1.0 / 16) << q;
  }
  LatencyHistogram extremes;
  extremes.record(0);
  extremes.record(UINT64_MAX);
  EXPECT_EQ(extremes.percentile(0.1), 0);
  EXPECT_GT(extremes.percentile(1), 1e12);
}

}  // namespace
}  // namespace kvrouter
