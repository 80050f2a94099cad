// Routers that start with what another knew.
#include <gtest/gtest.h>

#include <optional>
#include <set>
#include <stdexcept>

#include "events/batch_builder.h"
#include "kvrouter/router.h"
#include "router/replaying_worker.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::eventually;
using testing::ReplayingWorker;
using testing::stored_map;

constexpr std::size_t kBlock = 4;
constexpr std::size_t kBuffer = 20;  // batches that a worker keeps

std::string store(std::uint64_t name) {
  return batch_of({stored_map({{name}, std::nullopt, {name, name, name, name}, kBlock})});
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

RouterOptions options_of_one_worker(std::size_t block_size) {
  RouterOptions options;
  options.block_size = block_size;
  options.workers.resize(1);
  return options;
}

class WarmStart : public ::testing::Test {
 protected:
  void start_worker(const ReplayingWorker::Endpoints& at = {}) { worker_.emplace(zmq_, kBuffer, at); }
  // Another life of the worker, where the first was; it has stored nothing.
  void restart_worker() {
    const auto at = worker_->endpoints();
    worker_.reset();
    start_worker(at);
    stored_.clear();
  }
  WorkerEndpoints endpoints(bool replay = true) const {
    const auto at = worker_->endpoints();
    return {at.kv, "", "http://127.0.0.1:1", replay ? at.replay : ""};
  }
  // It has started with a snapshot, and its worker has not come.
  static std::unique_ptr<Router> router_without_workers(const std::string& snapshot) {
    auto router = std::make_unique<Router>(options_of_one_worker(kBlock));
    router->warm_start(bytes_of(snapshot));
    router->start();
    return router;
  }
  std::unique_ptr<Router> router(const std::string& snapshot = {}, bool replay = true) {
    RouterOptions options;
    options.block_size = kBlock;
    options.workers.push_back(endpoints(replay));
    auto router = std::make_unique<Router>(options);
    if (!snapshot.empty()) {
      EXPECT_EQ(router->warm_start(bytes_of(snapshot)), 1u);
    }
    router->start();
    return router;
  }
  void publish(std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t name = first; name <= last; ++name) {
      worker_->publish(store(name));
      stored_.insert(name);
    }
  }
  bool knows(Router& router, const std::set<EngineHash>& names) {
    return eventually([&] {
      return router.index().worker_blocks(0) == std::vector<EngineHash>(names.begin(), names.end()) &&
             router.status().workers[0].knowledge != CacheKnowledge::kRecovering;
    });
  }
  std::set<EngineHash> from(std::uint64_t first) {
    return std::set<EngineHash>(stored_.lower_bound(first), stored_.end());
  }
  // Of a router that has heard all of 100 batches.
  std::string snapshot_of_100() {
    const auto first = router();
    // By the third it is connected, and misses nothing of the rest, which is more than the worker keeps.
    for (std::uint64_t name = 1; name <= 3; ++name) {
      publish(name, name);
      EXPECT_TRUE(knows(*first, stored_));
    }
    publish(4, 100);
    EXPECT_TRUE(knows(*first, stored_));
    return first->snapshot();
  }

  zmq::context_t zmq_;
  std::optional<ReplayingWorker> worker_;
  std::set<EngineHash> stored_;
};

TEST_F(WarmStart, KnowsBlockForBlockWhatTheOtherKnew_AndWhatCameSince) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  publish(101, 115);  // while no router listens
  const auto warm = router(snapshot);
  EXPECT_TRUE(knows(*warm, stored_));
  EXPECT_EQ(warm->status().workers[0].knowledge, CacheKnowledge::kWhole);
  EXPECT_EQ(warm->status().workers[0].warm_starts, 1u);
  publish(116, 120);
  EXPECT_TRUE(knows(*warm, stored_));
  const auto cold = router();  // as a comparison: what the worker's buffer has
  EXPECT_TRUE(knows(*cold, from(120 - kBuffer + 1)));
}

TEST_F(WarmStart, RestartedWorker_IsNotBelieved) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  restart_worker();
  publish(501, 610);  // as many batches as before, and more
  const auto warm = router(snapshot);
  EXPECT_TRUE(knows(*warm, from(610 - kBuffer + 1)));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 0u);
}

TEST_F(WarmStart, RestartedWorkerThatHasPublishedLess_IsNotBelieved) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  restart_worker();
  publish(501, 505);
  const auto warm = router(snapshot);
  EXPECT_TRUE(knows(*warm, stored_));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 0u);
}

TEST_F(WarmStart, BufferThatDoesNotReachBack_IsNotBelieved) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  publish(101, 150);
  const auto warm = router(snapshot);
  EXPECT_TRUE(knows(*warm, from(150 - kBuffer + 1)));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 0u);
}

TEST_F(WarmStart, WorkerWithoutReplay_IsNotBelieved) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  const auto warm = router(snapshot, false);
  ASSERT_TRUE(eventually([&] { return warm->status().workers[0].state == WorkerState::kUp; }));
  publish(101, 101);
  EXPECT_TRUE(knows(*warm, from(101)));
}

TEST_F(WarmStart, ResetOfTheUserBeforeItIsConfirmed_Counts) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  const auto warm = router_without_workers(snapshot);
  // To a worker that answers nothing yet: the reset comes before the confirmation.
  worker_->lie([](zmq::socket_t&, const std::string&) {});
  warm->set_worker(0, endpoints());
  warm->reset();
  worker_->lie({});
  ASSERT_TRUE(eventually([&] { return warm->status().workers[0].resyncs > 0; }));
  EXPECT_TRUE(knows(*warm, {}));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 0u);
}

TEST_F(WarmStart, ResetOfTheUserBeforeTheWorkerComes_Counts) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  const auto warm = router_without_workers(snapshot);
  warm->reset();
  warm->set_worker(0, endpoints());
  EXPECT_TRUE(knows(*warm, from(100 - kBuffer + 1)));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 0u);
}

TEST_F(WarmStart, RouterThatEndsBeforeTheWorkerAnswers_PassesOnWhatItWasGiven) {
  start_worker();
  const std::string snapshot = snapshot_of_100();
  worker_->lie([](zmq::socket_t&, const std::string&) {});
  const std::string again = router(snapshot)->snapshot();
  worker_->lie({});
  const auto warm = router(again);
  EXPECT_TRUE(knows(*warm, stored_));
  EXPECT_EQ(warm->status().workers[0].warm_starts, 1u);
}

TEST_F(WarmStart, WorkersThatCannotBeConfirmedLater_AreNotInASnapshot) {
  start_worker();
  const auto deaf = router({}, false);
  ASSERT_TRUE(eventually([&] { return deaf->status().workers[0].state == WorkerState::kUp; }));
  publish(1, 1);
  ASSERT_TRUE(knows(*deaf, {1}));
  Router other(options_of_one_worker(kBlock));
  EXPECT_EQ(other.warm_start(bytes_of(deaf->snapshot())), 0u);
  const auto fenced = router();
  ASSERT_TRUE(knows(*fenced, {1}));
  fenced->reset(0, Router::Reset::kUntilCleared);
  EXPECT_EQ(other.warm_start(bytes_of(fenced->snapshot())), 0u);
}

TEST_F(WarmStart, WhatIsNoSnapshot_IsSaidAndNothingIsBelieved) {
  start_worker();
  std::string snapshot = snapshot_of_100();
  Router other(options_of_one_worker(2 * kBlock));
  EXPECT_THROW(other.warm_start(bytes_of(snapshot)), std::invalid_argument);
  snapshot.back() ^= 1;
  EXPECT_THROW(other.warm_start(bytes_of(snapshot)), std::invalid_argument);
  EXPECT_THROW(other.warm_start({}), std::invalid_argument);
}

}  // namespace
}  // namespace kvrouter
