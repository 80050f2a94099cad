#include "kvrouter/policy.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>

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

struct Outcome {
  WorkerId worker;
  std::vector<double> scores;
};

Outcome choose(Policy& policy, const std::vector<WorkerView>& workers, Random& random, std::size_t num_tokens = 640) {
  std::vector<double> scores(workers.size(), -99);
  const WorkerId worker = policy.choose({num_tokens, 64}, workers, random, scores);
  return {worker, scores};
}

TEST(PolicyRegistry, KnowsItsNames) {
  for (const std::string& name : policy_names()) {
    ASSERT_NE(make_policy(name), nullptr) << name;
    EXPECT_EQ(make_policy(name)->name(), name);
  }
  EXPECT_EQ(make_policy("best"), nullptr);
  const std::vector<std::string> names = policy_names();
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
}

TEST(LinearPolicy, TheGuidesExample) {
  const auto policy = make_policy("linear");
  CountingRandom random;
  // 2 of 10 blocks, usage 0.3, queue 1 of 10; 8 of 10 blocks, usage 0.2, queue 10 of 10.
  const Outcome outcome = choose(*policy, {{2, 0.3, 1, true}, {8, 0.2, 10, true}}, random);
  EXPECT_NEAR(outcome.scores[0], 2 * 0.2 - 0.3 - 0.1, 1e-12);
  EXPECT_NEAR(outcome.scores[1], 2 * 0.8 - 0.2 - 1.0, 1e-12);
  EXPECT_EQ(outcome.worker, 1u);
}

TEST(Policies, OfEquallyGoodWorkersTheOneWithPrecedenceWins) {
  CountingRandom random;
  std::vector<WorkerView> workers(4);
  workers[1].precedence = workers[2].precedence = 7;
  workers[3].precedence = 9;
  workers[3].available = false;
  std::map<WorkerId, int> chosen;
  const auto policy = make_policy("linear");
  for (int i = 0; i < 1000; ++i) ++chosen[choose(*policy, workers, random).worker];
  EXPECT_EQ(chosen[0] + chosen[3], 0);
  EXPECT_GT(chosen[1], 400);
  EXPECT_GT(chosen[2], 400);
  workers[0].overlap_blocks = 1;
  EXPECT_EQ(choose(*policy, workers, random).worker, 0u);
}

RC_GTEST_PROP(LinearPolicy, ScoresAreTheFormula_AndTheBestAvailableWins, ()) {
  const auto workers = *rc::gen::suchThat(
      rc::gen::container<std::vector<WorkerView>>(
          rc::gen::map(rc::gen::tuple(rc::gen::inRange<std::uint32_t>(0, 11), rc::gen::inRange(0, 11),
                                      rc::gen::inRange<std::int64_t>(0, 60), rc::gen::arbitrary<bool>()),
                       [](const auto& t) {
                         return WorkerView{std::get<0>(t), std::get<1>(t) / 10.0, std::get<2>(t), std::get<3>(t)};
                       })),
      [](const auto& list) { return std::any_of(list.begin(), list.end(), [](auto& w) { return w.available; }); });
  const auto num_tokens = *rc::gen::inRange<std::size_t>(640, 700);
  const auto policy = make_policy("linear");
  CountingRandom random;
  const Outcome outcome = choose(*policy, workers, random, num_tokens);
  std::int64_t longest = 0;
  for (const WorkerView& w : workers) longest = std::max(longest, w.waiting);
  double best = -1e9;
  for (std::size_t i = 0; i < workers.size(); ++i) {
    const WorkerView& w = workers[i];
    const double overlap = w.overlap_blocks * 64.0 / static_cast<double>(num_tokens);
    const double queue = longest ? static_cast<double>(w.waiting) / static_cast<double>(longest) : 0.0;
    const double score = 2 * overlap - w.kv_usage - queue;
    RC_ASSERT(outcome.scores[i] == score);
    if (w.available) best = std::max(best, score);
  }
  RC_ASSERT(workers[outcome.worker].available);
  RC_ASSERT(outcome.scores[outcome.worker] == best);
}

TEST(LinearPolicy, Ties_AreSharedEvenly) {
  const auto policy = make_policy("linear");
  CountingRandom random;
  std::map<WorkerId, int> chosen;
  const std::vector<WorkerView> workers = {{5, 0, 0, true}, {0, 0, 0, true}, {5, 0, 0, true}, {5, 0, 0, true}};
  for (int i = 0; i < 3000; ++i) ++chosen[choose(*policy, workers, random).worker];
  EXPECT_EQ(chosen.count(1), 0u);
  for (const WorkerId w : {0u, 2u, 3u}) EXPECT_NEAR(chosen[w], 1000, 150) << w;  // 5 standard deviations
}

TEST(RoundRobinPolicy, TakesTurns_LeavingOutTheLost) {
  const auto policy = make_policy("round_robin");
  CountingRandom random;
  const std::vector<WorkerView> workers = {{0, 0, 0, true}, {9, 0, 0, false}, {0, 0, 0, true}};
  std::vector<WorkerId> turns;
  for (int i = 0; i < 4; ++i) turns.push_back(choose(*policy, workers, random).worker);
  EXPECT_EQ(turns, (std::vector<WorkerId>{0, 2, 0, 2}));
}

}  // namespace
}  // namespace kvrouter
