#include <gtest/gtest.h>

#include <thread>

#include "kvrouter/router.h"
#include "router/fake_publisher.h"

namespace kvrouter {
namespace {

using testing::eventually;
using testing::Publisher;
using namespace std::chrono_literals;

const std::vector<TokenId> kTokens = {1, 2, 3, 4, 5, 6, 7, 8};

TEST(SuspectWorker, SilentAfterARequest_IsLeftOutUntilItSpeaks) {
  zmq::context_t zmq;
  Publisher first(zmq), second(zmq);
  RouterOptions options;
  options.block_size = 4;
  options.suspect_after = 200ms;
  options.workers.push_back({"", first.endpoint(), "", ""});
  options.workers.push_back({"", second.endpoint(), "", ""});
  Router router(options);
  router.start();
  const auto state = [&](WorkerId w) { return router.status().workers[w].state; };
  const auto idle = R"({"kv_cache_usage": 0.0, "num_waiting_reqs": 0})";
  const auto busy = R"({"kv_cache_usage": 0.9, "num_waiting_reqs": 0})";
  ASSERT_TRUE(eventually([&] {
    first.send_load(idle);
    second.send_load(busy);
    std::this_thread::sleep_for(2ms);
    const RouterStatus status = router.status();
    return status.workers[0].load_messages > 0 && status.workers[1].load_messages > 0;
  }));
  // A last word each: nothing is on its way when the request is sent.
  first.send_load(R"({"kv_cache_usage": 0.1, "num_waiting_reqs": 0})");
  second.send_load(R"({"kv_cache_usage": 0.8, "num_waiting_reqs": 0})");
  ASSERT_TRUE(eventually([&] {
    const RouterStatus status = router.status();
    return status.workers[0].load.kv_usage == 0.1 && status.workers[1].load.kv_usage == 0.8;
  }));
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 0u);
  EXPECT_TRUE(eventually([&] { return state(0) == WorkerState::kSuspect; }));
  EXPECT_EQ(state(1), WorkerState::kUp);                  // as silent, but nothing was sent to it
  EXPECT_EQ(router.status().workers[0].load.waiting, 1);  // what was sent to it still waits there
  EXPECT_TRUE(eventually([&] {
    first.send_load(idle);
    std::this_thread::sleep_for(2ms);
    return state(0) == WorkerState::kUp;
  }));
}

TEST(SuspectWorker, ThatCannotBeProbed_GetsRequestsAgain) {
  zmq::context_t zmq;
  Publisher worker(zmq);
  RouterOptions options;
  options.block_size = 4;
  options.suspect_after = 100ms;
  options.workers.push_back({"", worker.endpoint(), "", ""});
  Router router(options);
  router.start();
  ASSERT_TRUE(eventually([&] {
    worker.send_load(R"({"kv_cache_usage": 0.0, "num_waiting_reqs": 0})");
    std::this_thread::sleep_for(2ms);
    return router.status().workers[0].load_messages > 0;
  }));
  worker.send_load(R"({"kv_cache_usage": 0.1, "num_waiting_reqs": 0})");
  ASSERT_TRUE(eventually([&] { return router.status().workers[0].load.kv_usage == 0.1; }));
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 0u);
  EXPECT_TRUE(eventually([&] { return router.status().workers[0].state == WorkerState::kSuspect; }));
  EXPECT_EQ(router.choose_for_tokens(kTokens).worker, 0u);  // there is no other
  EXPECT_TRUE(eventually([&] { return router.status().workers[0].state == WorkerState::kUp; }));
}

}  // namespace
}  // namespace kvrouter
