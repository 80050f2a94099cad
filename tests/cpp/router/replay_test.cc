#include <gtest/gtest.h>

#include <optional>
#include <set>

#include "events/batch_builder.h"
#include "kvrouter/router.h"
#include "router/replaying_worker.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::cleared_map;
using testing::eventually;
using testing::ReplayingWorker;
using testing::stored_map;

constexpr std::size_t kBlock = 4;

std::string store(std::uint64_t name) {
  return batch_of({stored_map({{name}, std::nullopt, {name, name, name, name}, kBlock})});
}

class RouterWithReplay : public ::testing::Test {
 protected:
  void start_worker(std::size_t buffer = 10'000, const ReplayingWorker::Endpoints& at = {}) {
    worker_.emplace(zmq_, buffer, at);
  }
  void start_router() {
    RouterOptions options;
    options.block_size = kBlock;
    options.workers.push_back({worker_->endpoints().kv, "", "", worker_->endpoints().replay});
    router_.emplace(options);
    router_->start();
  }
  WorkerStatus status() { return router_->status().workers[0]; }
  std::vector<EngineHash> blocks() { return router_->index().worker_blocks(0); }
  void publish(std::uint64_t name, bool lost = false) {
    worker_->publish(store(name), lost);
    stored_.insert(name);
  }
  bool up_to_date() {
    return eventually([&] { return blocks() == std::vector<EngineHash>(stored_.begin(), stored_.end()); });
  }

  zmq::context_t zmq_;
  std::optional<ReplayingWorker> worker_;
  std::optional<Router> router_;  // ends before the worker
  std::set<EngineHash> stored_;
};

TEST_F(RouterWithReplay, LateStart_KnowsWhatAnEarlyOneKnows) {
  start_worker();
  for (std::uint64_t n = 1; n <= 3000; ++n) publish(n);
  start_router();
  EXPECT_TRUE(up_to_date());
  EXPECT_TRUE(eventually([&] { return status().knowledge == CacheKnowledge::kWhole; }));
  for (std::uint64_t n = 3001; n <= 3050; ++n) publish(n);
  EXPECT_TRUE(up_to_date());
}

TEST_F(RouterWithReplay, LostBatches_AreReplayed_TheLastOneToo) {
  start_worker();
  start_router();
  for (std::uint64_t n = 1; n <= 300; ++n) publish(n, n % 7 == 0);
  EXPECT_TRUE(up_to_date());
  publish(301, true);  // nothing follows that would show it
  EXPECT_TRUE(up_to_date());
  EXPECT_EQ(status().knowledge, CacheKnowledge::kWhole);
}

TEST_F(RouterWithReplay, BufferThatIsTooShort_LeavesAPartUntilTheCacheIsCleared) {
  start_worker(10);
  for (std::uint64_t n = 1; n <= 50; ++n) publish(n);
  start_router();
  for (std::uint64_t n = 1; n <= 40; ++n) stored_.erase(n);  // beyond the buffer
  EXPECT_TRUE(up_to_date());
  EXPECT_TRUE(eventually([&] { return status().knowledge == CacheKnowledge::kPartial; }));
  worker_->publish(batch_of({cleared_map()}));
  stored_.clear();
  publish(60);
  EXPECT_TRUE(up_to_date());
  EXPECT_TRUE(eventually([&] { return status().knowledge == CacheKnowledge::kWhole; }));
}

TEST_F(RouterWithReplay, RestartedWorker_StartsEmpty) {
  start_worker();
  start_router();
  for (std::uint64_t n = 1; n <= 20; ++n) publish(n);
  ASSERT_TRUE(up_to_date());
  const auto at = worker_->endpoints();
  worker_.reset();
  start_worker(10'000, at);
  stored_.clear();
  EXPECT_TRUE(up_to_date());
  for (std::uint64_t n = 101; n <= 130; ++n) publish(n);  // as many batches as before, and more
  EXPECT_TRUE(up_to_date());
  EXPECT_TRUE(eventually([&] { return status().knowledge == CacheKnowledge::kWhole; }));
}

TEST_F(RouterWithReplay, ResetUntilCleared_IsNotUndoneByAReplay) {
  start_worker();
  start_router();
  for (std::uint64_t n = 1; n <= 20; ++n) publish(n);
  ASSERT_TRUE(up_to_date());
  router_->reset(0, Router::Reset::kUntilCleared);
  stored_.clear();
  worker_->publish(store(21));        // of the old cache
  worker_->publish(store(22), true);  // a gap
  worker_->publish(store(23));
  EXPECT_TRUE(eventually([&] { return status().gaps > 0 && status().knowledge == CacheKnowledge::kWhole; }));
  EXPECT_TRUE(blocks().empty());
  worker_->publish(batch_of({cleared_map()}), true);  // lost as well
  publish(30);
  EXPECT_TRUE(up_to_date());
}

TEST_F(RouterWithReplay, HostileAnswers_CostTheReplayOnly) {
  start_worker();
  for (std::uint64_t n = 1; n <= 5; ++n) publish(n);
  worker_->lie([](zmq::socket_t& socket, const std::string& client) {
    for (const std::uint64_t sequence : {5u, 4u, 5u}) ReplayingWorker::send(socket, client, sequence, store(sequence));
  });
  start_router();
  EXPECT_TRUE(eventually([&] { return status().failed_replays > 0; }));
  // It goes on with what is said live.
  EXPECT_TRUE(eventually([&] {
    publish(1000 + stored_.size());
    return status().events.batches > 10 && status().knowledge == CacheKnowledge::kPartial;
  }));
  // And asks again, later, and believes the truth.
  worker_->lie(nullptr);
  EXPECT_TRUE(eventually([&] { return status().knowledge == CacheKnowledge::kWhole; }));
  EXPECT_TRUE(up_to_date());
}

TEST_F(RouterWithReplay, NobodyReplays_IsToldOnceAndLiveEventsCount) {
  start_worker();
  RouterOptions options;
  options.block_size = kBlock;
  options.workers.push_back({worker_->endpoints().kv, "", "", "tcp://127.0.0.1:1"});
  router_.emplace(options);
  router_->start();
  EXPECT_TRUE(eventually([&] {
    publish(1 + stored_.size());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return !blocks().empty();
  }));
  EXPECT_TRUE(eventually([&] {
    const auto notice = router_->next_notice(std::chrono::milliseconds(10));
    return notice && notice->text.find("replay") != std::string::npos;
  }));
}

}  // namespace
}  // namespace kvrouter
