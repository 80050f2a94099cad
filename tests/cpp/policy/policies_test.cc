// What each policy is for, in a few workers.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "kvrouter/policy.h"
#include "kvrouter/router.h"

namespace kvrouter {
namespace {

class CountingRandom final : public Random {
 public:
  std::uint64_t next() override {
    return state_ = state_ * 6364136223846793005ull + 1442695040888963407ull, state_ >> 33;
  }

 private:
  std::uint64_t state_ = 1;
};

constexpr std::size_t kBlock = 64;

WorkerView worker(std::uint32_t blocks = 0, std::int64_t in_flight = 0, double prefill_tokens = 0) {
  WorkerView view;
  view.overlap_blocks = view.expected_blocks = blocks;
  view.in_flight = in_flight;
  view.prefill_tokens = prefill_tokens;
  view.context_tokens = 1000.0 * static_cast<double>(in_flight);
  view.seconds_per_token = 1e-4;
  return view;
}

WorkerId choose(Policy& policy, const std::vector<WorkerView>& workers, Random& random, std::size_t num_tokens = 640,
                std::vector<PrefixHash> prefixes = {}) {
  std::vector<double> scores(workers.size());
  return policy.choose({num_tokens, kBlock, prefixes}, workers, random, scores);
}

WorkerId choose(std::string_view name, const std::vector<WorkerView>& workers, std::size_t num_tokens = 640) {
  CountingRandom random;
  return choose(*make_policy(name), workers, random, num_tokens);
}

RC_GTEST_PROP(Policies, NeverChooseALostWorker, ()) {
  const auto name = *rc::gen::elementOf(policy_names());
  const auto workers = *rc::gen::suchThat(
      rc::gen::container<std::vector<WorkerView>>(rc::gen::map(
          rc::gen::tuple(rc::gen::inRange<std::uint32_t>(0, 11), rc::gen::inRange<std::int64_t>(0, 200),
                         rc::gen::inRange(0, 9000), rc::gen::arbitrary<bool>(), rc::gen::arbitrary<bool>()),
          [](const auto& t) {
            WorkerView view = worker(std::get<0>(t), std::get<1>(t), std::get<2>(t));
            view.available = std::get<3>(t);
            view.evicting = std::get<4>(t);
            view.waiting = std::get<1>(t) / 2;
            return view;
          })),
      [](const auto& list) { return std::any_of(list.begin(), list.end(), [](auto& w) { return w.available; }); });
  const auto policy = make_policy(name);
  CountingRandom random;
  for (int i = 0; i < 5; ++i) {
    const WorkerId chosen = choose(*policy, workers, random, 640, {17u, 18u});
    RC_ASSERT(chosen < workers.size());
    RC_ASSERT(workers[chosen].available);
  }
}

TEST(RandomPolicy, ReachesEveryWorkerEvenly) {
  const auto policy = make_policy("random");
  CountingRandom random;
  std::map<WorkerId, int> chosen;
  for (int i = 0; i < 4000; ++i) ++chosen[choose(*policy, std::vector<WorkerView>(4, worker()), random)];
  for (WorkerId w = 0; w < 4; ++w) EXPECT_NEAR(chosen[w], 1000, 150) << w;
}

TEST(LeastLoadedPolicy, FewestInFlight) {
  EXPECT_EQ(choose("least_loaded", {worker(9, 3), worker(0, 1), worker(9, 2)}), 1u);
}

TEST(PowerOfTwoPolicy, TheBusiestIsChosenOnlyWhenDrawnTwice) {
  const auto policy = make_policy("power_of_two");
  CountingRandom random;
  std::map<WorkerId, int> chosen;
  for (int i = 0; i < 4000; ++i) ++chosen[choose(*policy, {worker(0, 5), worker(0, 1), worker(0, 0)}, random)];
  EXPECT_NEAR(chosen[0], 4000 / 9, 100);      // both draws
  EXPECT_NEAR(chosen[2], 4000 * 5 / 9, 150);  // either draw
}

TEST(SessionPolicy, ASessionKeepsItsWorkerWithinTheBound) {
  const auto policy = make_policy("session");
  CountingRandom random;
  std::set<WorkerId> homes;
  for (PrefixHash session = 0; session < 64; ++session) {
    const std::vector<PrefixHash> prefixes = {session * 7919, 1};
    std::vector<WorkerView> workers(8, worker(0, 4));
    const WorkerId home = choose(*policy, workers, random, 640, prefixes);
    homes.insert(home);
    EXPECT_EQ(choose(*policy, workers, random, 640, prefixes), home);
    workers[home].in_flight = 20;
    const WorkerId next = choose(*policy, workers, random, 640, prefixes);
    EXPECT_NE(next, home);
    workers[next].in_flight = 3;
    EXPECT_EQ(choose(*policy, workers, random, 640, prefixes), next);
  }
  EXPECT_EQ(homes.size(), 8u);
}

TEST(CacheAwarePolicy, AffinityUntilOutOfBalance) {
  EXPECT_EQ(choose("cache_aware", {worker(4, 60), worker(9, 60), worker(0, 0)}), 1u);
  EXPECT_EQ(choose("cache_aware", {worker(4, 65), worker(9, 60), worker(0, 0)}), 2u);
  std::vector<WorkerView> workers = {worker(1, 0), worker(3, 0), worker(2, 0)};  // 3 of 10 is no match
  workers[0].cached_blocks = 500;
  workers[1].cached_blocks = 400;
  workers[2].cached_blocks = 300;
  EXPECT_EQ(choose("cache_aware", workers), 2u);
}

TEST(PrefillDecodePolicy, CountsPrefillAndContext) {
  // 640 tokens: 10 blocks to prefill, or 2; against 1000-token contexts of 15.6 blocks each.
  EXPECT_EQ(choose("prefill_decode", {worker(8, 1), worker(0, 0)}), 1u);
  EXPECT_EQ(choose("prefill_decode", {worker(8, 0, 640), worker(0, 0)}), 1u);
  EXPECT_EQ(choose("prefill_decode", {worker(8, 0, 448), worker(0, 0)}), 0u);
}

TEST(PrefillTokensTimesBatchPolicy, IsTheProduct) {
  EXPECT_EQ(choose("prefill_tokens_x_batch", {worker(8, 3), worker(0, 0)}), 0u);  // 129 * 4 < 641
  EXPECT_EQ(choose("prefill_tokens_x_batch", {worker(8, 4), worker(0, 0)}), 1u);  // 129 * 5 > 641
}

TEST(AdaptivePolicy, StaysUntilWaitingCostsMoreThanAPrefill) {
  EXPECT_EQ(choose("adaptive", {worker(9, 1), worker(0, 0)}), 0u);
  EXPECT_EQ(choose("adaptive", {worker(9, 1, 2000), worker(0, 0)}), 1u);
  EXPECT_EQ(choose("adaptive", {worker(9, 40), worker(0, 0)}), 1u);
}

TEST(AdaptivePolicy, PrefixesOnTheirWayCount) {
  std::vector<WorkerView> workers = {worker(0, 1), worker(0, 0)};
  EXPECT_EQ(choose("adaptive", workers), 1u);
  workers[0].expected_blocks = 10;
  EXPECT_EQ(choose("adaptive", workers), 0u);
}

TEST(AdaptivePolicy, AFullCacheIsWorthMore) {
  std::vector<WorkerView> workers = {worker(10, 1, 400), worker(0, 0)};
  EXPECT_EQ(choose("adaptive", workers), 1u);
  workers[1].evicting = true;
  EXPECT_EQ(choose("adaptive", workers), 0u);
}

TEST(AdaptivePolicy, ASlowWorkerGetsLess) {
  std::vector<WorkerView> workers = {worker(0, 1), worker(0, 2)};
  EXPECT_EQ(choose("adaptive", workers), 0u);
  workers[0].seconds_per_token *= 3;
  EXPECT_EQ(choose("adaptive", workers), 1u);
}

}  // namespace
}  // namespace kvrouter
