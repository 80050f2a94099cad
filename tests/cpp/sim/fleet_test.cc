#include "sim/fleet.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "kvrouter/policy.h"

namespace kvrouter::sim {
namespace {

FleetOptions options_for(std::int32_t num_workers, const std::string& policy) {
  FleetOptions options;
  options.num_workers = num_workers;
  options.policy = policy;
  return options;
}

// `groups` prompts of 1,000 tokens, `samples` of each, all at once.
std::vector<FleetRequest> groups_of(std::uint64_t groups, int samples) {
  std::vector<FleetRequest> requests;
  for (std::uint64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < samples; ++i) requests.push_back({0, -1, 8 + i, 0, {{g + 1, 1000}}});
  }
  return requests;
}

TEST(Fleet, EveryRequestIsServedUnderEveryPolicy) {
  std::vector<FleetRequest> requests = groups_of(6, 4);
  for (std::int64_t i = 0; i < 12; ++i) requests.push_back({0.2, i, 5, 0, {{100 + static_cast<std::uint64_t>(i), 70}}});
  for (const std::string& policy : policy_names()) {
    const FleetResult result = run_fleet(options_for(3, policy), requests);
    EXPECT_EQ(result.requests, 36) << policy;
    EXPECT_GT(result.seconds, 0.2) << policy;
    EXPECT_GT(result.ttft_p99_s, 0) << policy;
    EXPECT_GE(result.hit_rate, 0) << policy;
    EXPECT_LE(result.hit_rate, 1) << policy;
    EXPECT_GE(result.imbalance, 1 - 1e-9) << policy;
  }
}

TEST(Fleet, TheSameInputGivesTheSameResult) {
  for (const char* policy : {"linear", "adaptive", "power_of_two"}) {
    const FleetResult a = run_fleet(options_for(4, policy), groups_of(8, 8));
    const FleetResult b = run_fleet(options_for(4, policy), groups_of(8, 8));
    EXPECT_EQ(a.seconds, b.seconds);
    EXPECT_EQ(a.hit_rate, b.hit_rate);
    EXPECT_EQ(a.steps, b.steps);
  }
}

TEST(Fleet, OneWorker_IsTheSchedulerItself) {
  FleetOptions options = options_for(1, "round_robin");
  options.network_delay = 0;
  options.time = {0.01, 1e-4, 0, 0, 1.0, 0, 0};
  // Two prompts of one content, the second after the first: a step for the prompt and one for each further token.
  std::vector<FleetRequest> requests = {{0, -1, 3, 0, {{1, 1000}}}, {5, -1, 1, 0, {{1, 1000}}}};
  const FleetResult result = run_fleet(options, requests);
  EXPECT_EQ(result.steps, 4);
  const double second = 0.01 + 1e-4 * (1000 - 960);  // 15 of its blocks are cached
  EXPECT_NEAR(result.seconds, 5 + second, 1e-9);
  EXPECT_NEAR(result.ttft_p50_s, second, 1e-9);
  EXPECT_NEAR(result.hit_rate, 960.0 / 2000, 1e-9);
}

TEST(Fleet, AFollowUpGoesOnFromTheAnswer) {
  FleetOptions options = options_for(1, "round_robin");
  // 640 tokens and 65 of an answer, then 63 more: all but the last of the blocks are cached.
  std::vector<FleetRequest> requests = {{0, -1, 65, 0, {{1, 640}}}, {1, 0, 1, 0, {{2, 63}}}};
  const FleetResult result = run_fleet(options, requests);
  EXPECT_NEAR(result.hit_rate, 704.0 / (640 + 768), 1e-9);
}

TEST(Fleet, EventsReachTheRouterThroughItsDecoder) {
  // One prompt again and again, one user: linear stays with the worker that tells of its blocks, as soon as it does.
  FleetOptions options = options_for(4, "linear");
  options.users = 1;
  std::vector<FleetRequest> requests(20, FleetRequest{0, -1, 4, 0, {{1, 1000}}});
  EXPECT_NEAR(run_fleet(options, requests).hit_rate, 19 * 960.0 / 20000, 1e-9);
  options.event_delay = 1e6;
  EXPECT_LT(run_fleet(options, requests).hit_rate, 18 * 960.0 / 20000);
}

TEST(Fleet, Adaptive_NeedsNeitherEventsNorLoadMessagesForABurst) {
  FleetOptions options = options_for(8, "adaptive");
  const double with = run_fleet(options, groups_of(32, 16)).seconds;
  options.event_delay = 2;
  options.load_loss = 1;
  EXPECT_LT(run_fleet(options, groups_of(32, 16)).seconds, 1.05 * with);
}

TEST(Fleet, UsersSendOneRequestEachAtATime) {
  FleetOptions options = options_for(1, "round_robin");
  options.users = 1;
  options.time = {1.0, 0, 0, 0, 1.0, 0, 0};
  options.network_delay = 0;
  const std::vector<FleetRequest> requests(5, FleetRequest{0, -1, 2, 0, {{1, 10}}});
  EXPECT_NEAR(run_fleet(options, requests).seconds, 10, 1e-9);
}

TEST(Fleet, BadInputIsRefused) {
  FleetOptions options = options_for(2, "linear");
  EXPECT_THROW(run_fleet(options, {{-1, -1, 1, 0, {{1, 10}}}}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options, {{0, 0, 1, 0, {{1, 10}}}}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options, {{0, -1, 1, 0, {}}}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options, {{0, -1, 0, 0, {{1, 10}}}}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options, {{0, -1, 1, 0, {{1, 100'000}}}}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options_for(0, "linear"), {}), std::invalid_argument);
  EXPECT_THROW(run_fleet(options_for(2, "best"), {}), std::invalid_argument);
  options.slowdown = {1.0};
  EXPECT_THROW(run_fleet(options, {}), std::invalid_argument);
}

}  // namespace
}  // namespace kvrouter::sim
