// Batches: the decisions of one call know of each other.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "kvrouter/router.h"

namespace kvrouter {
namespace {

constexpr std::size_t kBlock = 64;

struct Prompts {
  std::vector<std::vector<LocalHash>> blocks;
  std::vector<BatchRequest> requests;
  std::vector<std::size_t> group;  // of each request
};

// `groups` prompts, `samples` of each, of some `tokens` tokens, in order or shuffled.
Prompts grpo_batch(std::size_t groups, std::size_t samples, std::size_t tokens, bool shuffled = false) {
  Prompts batch;
  for (std::size_t g = 0; g < groups; ++g) {
    std::vector<LocalHash>& blocks = batch.blocks.emplace_back(tokens / kBlock);
    std::iota(blocks.begin(), blocks.end(), 1 + g * 1000);
  }
  for (std::size_t i = 0; i < groups * samples; ++i) {
    const std::size_t place = shuffled ? i * 7919 % (groups * samples) : i;
    batch.group.push_back(place / samples);
    batch.requests.push_back({batch.blocks[place / samples], tokens});
  }
  return batch;
}

Router make_router(std::size_t num_workers, const std::string& policy = "linear", std::uint64_t seed = 0) {
  RouterOptions options;
  options.block_size = kBlock;
  options.workers.resize(num_workers);
  options.policy = policy;
  options.seed = seed;
  return Router(options);
}

std::vector<Choice> choose(Router& router, const Prompts& batch) {
  std::vector<Choice> choices(batch.requests.size());
  router.choose_batch(batch.requests, choices);
  return choices;
}

double imbalance(const std::vector<Choice>& choices, const Prompts& batch, std::size_t num_workers) {
  std::vector<double> tokens(num_workers);
  for (std::size_t i = 0; i < choices.size(); ++i) {
    tokens[choices[i].worker] += static_cast<double>(batch.requests[i].num_tokens);
  }
  const double mean = std::accumulate(tokens.begin(), tokens.end(), 0.0) / static_cast<double>(num_workers);
  return *std::max_element(tokens.begin(), tokens.end()) / mean;
}

double mean_workers_a_group(const std::vector<Choice>& choices, const Prompts& batch) {
  std::map<std::size_t, std::set<WorkerId>> workers;
  for (std::size_t i = 0; i < choices.size(); ++i) workers[batch.group[i]].insert(choices[i].worker);
  double sum = 0;
  for (const auto& [group, set] : workers) sum += static_cast<double>(set.size());
  return sum / static_cast<double>(workers.size());
}

TEST(RouterBatch, OneGroup_NeitherScattersNorPilesUp) {
  for (const std::size_t num_workers : {8, 32, 512}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      Router router = make_router(num_workers, "linear", seed);
      const std::vector<Choice> choices = choose(router, grpo_batch(1, 16, 1600));
      std::map<WorkerId, int> sent;
      for (const Choice& choice : choices) ++sent[choice.worker];
      EXPECT_GE(sent.size(), 2u);
      EXPECT_LE(sent.size(), 6u);
      for (const auto& [worker, count] : sent) EXPECT_LE(count, 8) << worker;
    }
  }
}

RC_GTEST_PROP(RouterBatch, Groups_StayTogetherWithinABalanceOfTokens, ()) {
  const auto groups = *rc::gen::inRange<std::size_t>(4, 97);
  const auto samples = *rc::gen::element<std::size_t>(4, 8, 16);
  RC_PRE(groups * samples >= 64);
  const bool shuffled = *rc::gen::arbitrary<bool>();
  Router router = make_router(32, "linear", *rc::gen::inRange<std::uint64_t>(0, 1000));
  const Prompts batch = grpo_batch(groups, samples, 1600, shuffled);
  const std::vector<Choice> choices = choose(router, batch);
  RC_ASSERT(imbalance(choices, batch, 32) <= 1.5 + 1e-9);
  const double needed = std::max(1.0, 32.0 / static_cast<double>(groups));  // workers a group, for all to have work
  RC_ASSERT(mean_workers_a_group(choices, batch) <= 1 + 2 * needed);
}

TEST(RouterBatch, PrefixSentEarlierCountsAsHeld) {
  Router router = make_router(4);
  const std::vector<Choice> choices = choose(router, grpo_batch(1, 2, 640));
  // Too small for both samples to share a worker by tokens, but for the floor of a quarter of the group: one each.
  EXPECT_EQ(choices[0].overlap_blocks, 0u);
  const std::vector<Choice> more = choose(router, grpo_batch(1, 16, 640));
  std::map<WorkerId, int> seen;
  for (const Choice& choice : more) {
    EXPECT_EQ(choice.overlap_blocks, seen[choice.worker]++ ? 10u : 0u);
  }
}

TEST(RouterBatch, WhatTheIndexKnowsCounts) {
  Router router = make_router(4);
  const Prompts batch = grpo_batch(4, 4, 640);
  for (WorkerId w = 0; w < 4; ++w) {
    std::vector<StoredBlock> stored;
    for (const LocalHash hash : batch.blocks[w]) stored.push_back({hash, hash});
    router.index().store(3 - w, std::nullopt, stored);
  }
  const std::vector<Choice> choices = choose(router, batch);
  for (std::size_t i = 0; i < choices.size(); ++i) {
    EXPECT_EQ(choices[i].worker, 3 - batch.group[i]);
    EXPECT_EQ(choices[i].overlap_blocks, 10u);
  }
}

TEST(RouterBatch, CountsAndWaitsAsSingleDecisionsDo) {
  Router router = make_router(2, "round_robin");
  const std::vector<Choice> choices = choose(router, grpo_batch(1, 5, 640));
  for (std::size_t i = 0; i < choices.size(); ++i) EXPECT_EQ(choices[i].worker, i % 2);
  EXPECT_EQ(router.loads().get(0).waiting, 3);
  EXPECT_EQ(router.status().decisions, 5u);
  EXPECT_EQ(router.status().fallbacks, 0u);
  router.choose_batch({}, {});
  EXPECT_EQ(router.status().decisions, 5u);
}

TEST(RouterBatch, FromTokens_TheSameAsFromHashes) {
  std::vector<std::vector<TokenId>> tokens;
  for (TokenId i = 0; i < 12; ++i) {
    tokens.emplace_back(200 + i % 3 * 64);
    std::iota(tokens.back().begin(), tokens.back().end(), i / 4 * 1000);
  }
  std::vector<std::vector<LocalHash>> hashes;
  std::vector<BatchRequest> requests;
  std::vector<std::span<const TokenId>> spans(tokens.begin(), tokens.end());
  hashes.reserve(tokens.size());
  for (const auto& request : tokens) {
    hash_blocks(request, kBlock, 5, hashes.emplace_back(request.size() / kBlock));
    requests.push_back({hashes.back(), request.size()});
  }
  Router a = make_router(3), b = make_router(3);
  std::vector<Choice> from_tokens(12), from_hashes(12);
  a.choose_batch_for_tokens(spans, 5, from_tokens);
  b.choose_batch(requests, from_hashes);
  for (std::size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(from_tokens[i].worker, from_hashes[i].worker);
    EXPECT_EQ(from_tokens[i].overlap_blocks, from_hashes[i].overlap_blocks);
  }
}

TEST(RouterBatch, BlocklessRequestsAreSpread) {
  Router router = make_router(4);
  std::vector<BatchRequest> requests(40, BatchRequest{{}, 10});
  std::vector<Choice> choices(40);
  router.choose_batch(requests, choices);
  std::map<WorkerId, int> sent;
  for (const Choice& choice : choices) ++sent[choice.worker];
  for (const auto& [worker, count] : sent) EXPECT_LE(count, 15) << worker;
  EXPECT_EQ(sent.size(), 4u);
}

TEST(RouterBatch, Adaptive_BalancesGroupsAndSplitsFew) {
  for (const bool shuffled : {false, true}) {
    Router router = make_router(32, "adaptive");
    const Prompts batch = grpo_batch(64, 16, 1600, shuffled);
    const std::vector<Choice> choices = choose(router, batch);
    EXPECT_LE(imbalance(choices, batch, 32), 1.1);
    EXPECT_LE(mean_workers_a_group(choices, batch), 3.0);  // pairs of eight, and few splits for balance
    std::set<Ticket> tickets;
    for (const Choice& choice : choices) tickets.insert(choice.ticket);
    EXPECT_EQ(tickets.size(), choices.size());
    EXPECT_EQ(tickets.count(0), 0u);
  }
}

TEST(RouterBatch, Adaptive_KnowsOfTheBatchBefore) {
  Router router = make_router(8, "adaptive");
  const Prompts batch = grpo_batch(16, 4, 1600);
  const std::vector<Choice> first = choose(router, batch);
  for (const Choice& choice : first) router.complete(choice.ticket);
  std::map<std::size_t, std::set<WorkerId>> homes;
  for (std::size_t i = 0; i < first.size(); ++i) homes[batch.group[i]].insert(first[i].worker);
  const std::vector<Choice> second = choose(router, batch);  // no event has come: the prefixes are on their way
  std::size_t at_home = 0;
  for (std::size_t i = 0; i < second.size(); ++i) at_home += homes[batch.group[i]].count(second[i].worker);
  EXPECT_GE(at_home, second.size() * 9 / 10);
}

TEST(RouterAccount, ABurstOfSingleRequestsStaysTogether) {
  RouterOptions options;
  options.block_size = kBlock;
  options.workers.resize(8);
  options.policy = "adaptive";
  options.clock = [] { return 0.0; };
  Router router(options);
  const Prompts batch = grpo_batch(32, 16, 1600);
  std::vector<Choice> choices;
  for (const BatchRequest& request : batch.requests) {
    choices.push_back(router.choose(request.blocks, request.num_tokens));
  }
  // None of the prompts is cached yet, and no message has come: still they neither scatter nor pile up.
  EXPECT_LE(mean_workers_a_group(choices, batch), 4.0);
  EXPECT_LE(imbalance(choices, batch, 8), 1.25);
  for (const Choice& choice : choices) {
    EXPECT_TRUE(router.first_token(choice.ticket));
    EXPECT_TRUE(router.complete(choice.ticket, {16, 0.1}));
    EXPECT_FALSE(router.complete(choice.ticket));
  }
}

TEST(RouterAccount, PoliciesThatKeepNoneGiveNoTickets) {
  Router router = make_router(2, "linear");
  const Choice choice = router.choose({}, 10);
  EXPECT_EQ(choice.ticket, 0u);
  EXPECT_FALSE(router.complete(choice.ticket));
  EXPECT_FALSE(router.first_token(12345));
}

TEST(RouterAccount, FullCaches_AreTold) {
  // 20 prompts of 10 blocks each go to one worker that holds no more than 100 blocks: from then on it evicts.
  RouterOptions options;
  options.block_size = kBlock;
  options.workers.resize(2);
  options.policy = "adaptive";
  double now = 0;
  options.clock = [&now] { return now; };
  Router router(options);
  const auto prompt = [](std::uint64_t n) {
    std::vector<LocalHash> blocks(100);
    std::iota(blocks.begin(), blocks.end(), n * 1000 + 1);
    return blocks;
  };
  std::vector<StoredBlock> held;
  for (const LocalHash hash : prompt(1)) held.push_back({hash, hash});
  router.index().store(0, std::nullopt, held);
  router.index().store(1, std::nullopt, held);
  std::map<WorkerId, std::vector<EngineHash>> newest;
  for (std::uint64_t n = 2; n < 12; ++n) {  // each computed, each pushing out the one before
    const std::vector<LocalHash> blocks = prompt(n);
    const Choice choice = router.choose(blocks, 6400);
    now += 5;
    router.complete(choice.ticket);
    EXPECT_EQ(choice.overlap_blocks, 0u);
  }
  // Both are full, neither grew: the holder of a prefix is left for a longer queue than before.
  const Decision decision = router.explain(prompt(1), 6400);
  EXPECT_EQ(decision.choice.overlap_blocks, 100u);
  const Decision other = router.explain(prompt(99), 6400);
  EXPECT_LT(other.scores[1 - decision.choice.worker], -1.9 * 6400 * 1e-4 * 0.5);
}

TEST(RouterAccount, ManyThreads) {
  Router router = make_router(4, "adaptive");
  const Prompts batch = grpo_batch(8, 4, 640);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      std::vector<Choice> choices(batch.requests.size());
      for (int i = 0; i < 50; ++i) {
        if (t == 0) {
          router.choose_batch(batch.requests, choices);
        } else {
          for (std::size_t r = 0; r < choices.size(); ++r) {
            choices[r] = router.choose(batch.requests[r].blocks, batch.requests[r].num_tokens);
          }
        }
        router.loads().update(static_cast<WorkerId>(t), {0.1, i, i});
        if (i % 10 == 0) router.reset();
        for (const Choice& choice : choices) {
          router.first_token(choice.ticket);
          EXPECT_TRUE(router.complete(choice.ticket, {8, 0}));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Decision decision = router.explain({}, 10);
  EXPECT_EQ(router.status().decisions, 3 * 50 * batch.requests.size() + 1);
  EXPECT_NE(decision.choice.ticket, 0u);
}

}  // namespace
}  // namespace kvrouter
