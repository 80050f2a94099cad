#include "sim/scheduler.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <numeric>
#include <set>
#include <stdexcept>

namespace kvrouter::sim {
namespace {

std::vector<Token> tokens(std::int32_t count, Token first = 10) {
  std::vector<Token> result(static_cast<std::size_t>(count));
  std::iota(result.begin(), result.end(), first);
  return result;
}

struct Engine {
  explicit Engine(std::int32_t num_blocks = 100, std::int32_t block_size = 4, std::int32_t budget = 64,
                  std::int32_t max_seqs = 8)
      : scheduler({max_seqs, budget, (num_blocks - 1) * block_size, 1'000'000}, {num_blocks, block_size}) {}

  std::shared_ptr<Request> add(std::vector<Token> prompt, std::int32_t max_tokens, std::uint64_t seed = 0) {
    auto request = std::make_shared<Request>(std::move(prompt), max_tokens, seed);
    scheduler.add(request);
    return request;
  }
  StepWork step() {
    const StepWork work = scheduler.begin_step();
    scheduler.finish_step();
    return work;
  }
  void run() {
    for (int i = 0; i < 100'000 && scheduler.has_work(); ++i) step();
    ASSERT_FALSE(scheduler.has_work());
  }
  KvEvents& events() { return scheduler.blocks().events(); }

  Scheduler scheduler;
};

// The blocks that the events say are held, as a router would follow them.
std::multiset<BlockHash> held(const KvEvents& events) {
  std::set<BlockHash> result;
  for (const KvEvent& event : events.events) {
    for (std::size_t i = 0; i < event.num_hashes; ++i) {
      const BlockHash hash = events.hashes[event.first_hash + i];
      if (event.kind == KvEvent::Kind::kStored) {
        result.insert(hash);
      } else {
        result.erase(hash);
      }
    }
    if (event.kind == KvEvent::Kind::kCleared) result.clear();
  }
  return {result.begin(), result.end()};
}

TEST(Scheduler, PromptCachedWhole_ComputesItsLastBlockAgain_AndTellsItAgain) {
  Engine engine;
  auto first = engine.add(tokens(12), 1);
  engine.run();
  EXPECT_EQ(first->num_cached_tokens, 0);
  ASSERT_EQ(engine.events().events.size(), 1U);
  EXPECT_FALSE(engine.events().events[0].has_parent);
  EXPECT_EQ(engine.events().events[0].num_hashes, 3U);
  EXPECT_EQ(engine.events().tokens, tokens(12));

  auto second = engine.add(tokens(12), 1);
  engine.run();
  EXPECT_EQ(second->num_cached_tokens, 8);
  ASSERT_EQ(engine.events().events.size(), 2U);
  const KvEvent& again = engine.events().events[1];
  EXPECT_EQ(again.num_hashes, 1U);
  EXPECT_TRUE(again.has_parent);
  EXPECT_EQ(again.parent, engine.events().hashes[1]);
  EXPECT_EQ(engine.events().hashes[again.first_hash], engine.events().hashes[2]);
  EXPECT_EQ(held(engine.events()).size(), 3U);
}

TEST(Scheduler, OneTokenMoreThanCached_HitsAllBlocks) {
  Engine engine;
  engine.add(tokens(12), 1);
  engine.run();
  auto longer = engine.add(tokens(13), 1);
  engine.run();
  EXPECT_EQ(longer->num_cached_tokens, 12);
  EXPECT_EQ(engine.scheduler.counters().prefix_cache_queries, 25);
  EXPECT_EQ(engine.scheduler.counters().prefix_cache_hits, 12);
}

TEST(Scheduler, GeneratedTokens_FillBlocks_ThatALaterRequestHits) {
  Engine engine;
  auto first = engine.add(tokens(6), 7);  // 12 of the 13 tokens are computed
  engine.run();
  EXPECT_EQ(held(engine.events()).size(), 3U);
  auto next = engine.add(first->sequence.tokens, 1);
  engine.run();
  EXPECT_EQ(next->num_cached_tokens, 12);
}

TEST(Scheduler, LongPrompt_IsComputedInChunks_AndGetsItsTokenAfterTheLast) {
  Engine engine(100, 4, 16);
  auto request = engine.add(tokens(40), 2);
  EXPECT_EQ(engine.step().prefill_tokens, 16);
  EXPECT_EQ(engine.step().prefill_tokens, 16);
  EXPECT_EQ(request->num_output_tokens(), 0);
  const StepWork last = engine.step();
  EXPECT_EQ(last.prefill_tokens, 8);
  EXPECT_EQ(last.attention_pairs, 8 * 32 + 36);
  EXPECT_EQ(request->num_output_tokens(), 1);
  const StepWork decode = engine.step();
  EXPECT_EQ(decode.prefill_tokens, 0);
  EXPECT_EQ(decode.decode_sequences, 1);
  EXPECT_EQ(decode.decode_pairs, 41);
  EXPECT_EQ(decode.attention_pairs, 0);
  EXPECT_TRUE(request->finished);
}

TEST(Scheduler, RunningRequestsComeFirst_WaitingOnesShareWhatIsLeftOfTheBudget) {
  Engine engine(100, 4, 16);
  engine.add(tokens(4), 10);
  engine.step();
  engine.add(tokens(30, 1000), 1);
  const StepWork work = engine.step();
  EXPECT_EQ(work.decode_sequences, 1);
  EXPECT_EQ(work.prefill_tokens, 15);
}

TEST(Scheduler, NoMoreThanMaxNumSeqsRun) {
  Engine engine(100, 4, 64, 2);
  for (Token i = 0; i < 5; ++i) engine.add(tokens(4, 100 * (i + 1)), 3);
  engine.step();
  EXPECT_EQ(engine.scheduler.num_running(), 2U);
  EXPECT_EQ(engine.scheduler.num_waiting(), 3U);
  engine.run();
  EXPECT_EQ(engine.scheduler.counters().finished, 5);
}

TEST(Scheduler, WaitingRequest_IsAdmittedOnlyWhenAllOfItFits) {
  Engine engine(11, 4, 8);         // 40 tokens, 8 a step
  engine.add(tokens(20), 5);       // takes 5 blocks, then a sixth
  engine.add(tokens(24, 500), 1);  // needs 6: its first chunk would fit at once
  engine.step();
  engine.step();
  engine.step();
  EXPECT_EQ(engine.scheduler.num_running(), 1U);
  engine.run();
  EXPECT_EQ(engine.scheduler.counters().preemptions, 0);
}

TEST(Scheduler, OutOfBlocks_PreemptsTheLastAdmitted_WhichStillGetsAllItsTokens) {
  Engine engine(6, 4);  // 5 blocks
  auto first = engine.add(tokens(8), 8);
  auto second = engine.add(tokens(8, 500), 8);
  engine.run();
  EXPECT_GT(engine.scheduler.counters().preemptions, 0);
  EXPECT_EQ(first->num_preemptions, 0);
  EXPECT_GT(second->num_preemptions, 0);
  EXPECT_EQ(second->num_output_tokens(), 8);
  Engine alone(6, 4);
  auto same = alone.add(tokens(8, 500), 8);
  alone.run();
  EXPECT_EQ(same->sequence.tokens, second->sequence.tokens);
  // A preempted request's second look into the cache is not counted.
  EXPECT_EQ(engine.scheduler.counters().prefix_cache_queries, 16);
}

TEST(Scheduler, PreemptedRequest_ComesBackBeforeThoseThatWaited) {
  Engine engine(6, 4);
  engine.add(tokens(8), 8);
  auto second = engine.add(tokens(8, 500), 8);
  auto third = engine.add(tokens(8, 900), 1);
  while (second->num_preemptions == 0) engine.step();
  EXPECT_EQ(engine.scheduler.waiting().front(), second);
  EXPECT_EQ(engine.scheduler.waiting().back(), third);
  engine.run();
}

TEST(Scheduler, Tokens_DependOnPromptSeedAndPositionAlone) {
  Engine one, other(50, 8, 32);
  auto a = one.add(tokens(9), 6, 3);
  one.run();
  other.add(tokens(9), 2, 3);
  auto b = other.add(tokens(9), 6, 3);
  auto c = other.add(tokens(9), 6, 4);
  auto d = other.add(tokens(9, 11), 6, 3);
  other.run();
  EXPECT_EQ(a->sequence.tokens, b->sequence.tokens);
  EXPECT_NE(a->sequence.tokens, c->sequence.tokens);
  EXPECT_NE(std::vector<Token>(a->sequence.tokens.begin() + 9, a->sequence.tokens.end()),
            std::vector<Token>(d->sequence.tokens.begin() + 9, d->sequence.tokens.end()));
  for (const Token token : a->sequence.tokens) EXPECT_GE(token, kFirstPlainToken);
}

TEST(Scheduler, Cancel_FreesBlocks_WhateverTheState) {
  Engine engine(100, 4, 8, 1);
  auto running = engine.add(tokens(20), 5);
  auto waiting = engine.add(tokens(20, 500), 5);
  engine.step();
  engine.scheduler.cancel(*waiting);
  EXPECT_EQ(engine.scheduler.num_waiting(), 0U);
  EXPECT_GT(engine.scheduler.kv_usage(), 0);
  engine.scheduler.cancel(*running);
  EXPECT_EQ(engine.scheduler.kv_usage(), 0);
  EXPECT_FALSE(engine.scheduler.has_work());
}

TEST(Scheduler, Reset_IsRefusedWhileRequestsRun_UnlessTheyArePreempted) {
  Engine engine;
  auto request = engine.add(tokens(8), 4);
  engine.step();
  EXPECT_FALSE(engine.scheduler.reset_prefix_cache(false));
  EXPECT_TRUE(engine.scheduler.reset_prefix_cache(true));
  EXPECT_EQ(engine.scheduler.num_waiting(), 1U);
  engine.run();
  EXPECT_EQ(request->num_output_tokens(), 4);
}

TEST(Scheduler, HashSeed_ChangesTheNames_NotTheHits) {
  std::set<BlockHash> names;
  for (const std::uint64_t seed : {1, 2}) {
    Scheduler scheduler({8, 64, 100, 1000}, {30, 4, true, true, seed});
    for (int i = 0; i < 2; ++i) {
      auto request = std::make_shared<Request>(tokens(9), 1, 0);
      scheduler.add(request);
      scheduler.begin_step();
      scheduler.finish_step();
      EXPECT_EQ(request->num_cached_tokens, i == 0 ? 0 : 8);
    }
    for (const BlockHash hash : scheduler.blocks().events().hashes) names.insert(hash);
  }
  EXPECT_EQ(names.size(), 4U);
}

TEST(Scheduler, CachingOff_HitsNothing_TellsNothing) {
  Scheduler scheduler({8, 64, 100, 1000}, {30, 4, false, true, 0});
  for (int i = 0; i < 2; ++i) {
    auto request = std::make_shared<Request>(tokens(9), 2, 0);
    scheduler.add(request);
    while (scheduler.has_work()) {
      scheduler.begin_step();
      scheduler.finish_step();
    }
    EXPECT_EQ(request->num_cached_tokens, 0);
  }
  EXPECT_TRUE(scheduler.blocks().events().empty());
}

TEST(Scheduler, OptionsThatCannotWork_AreRefusedByName) {
  const auto message = [](SchedulerOptions options, BlockManagerOptions blocks) {
    try {
      Scheduler scheduler(options, blocks);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message({8, 64, 1000, 1000}, {10, 4}).find("raise num_blocks"), std::string::npos);
  EXPECT_NE(message({0, 64, 30, 1000}, {10, 4}).find("max_num_seqs"), std::string::npos);
  EXPECT_NE(message({8, 0, 30, 1000}, {10, 4}).find("max_num_batched_tokens"), std::string::npos);
  EXPECT_NE(message({8, 64, 30, 3}, {10, 4}).find("vocab_size"), std::string::npos);
  EXPECT_NE(message({8, 64, 30, 1000}, {1, 4}).find("num_blocks"), std::string::npos);
  EXPECT_NE(message({8, 64, 30, 1000}, {10, 0}).find("block_size"), std::string::npos);
  EXPECT_EQ(message({8, 64, 36, 1000}, {10, 4}), "");
}

// Whatever is asked in whatever order: everybody is served, nothing leaks, and the events tell what the cache holds.
TEST(Scheduler, AnyLoad_IsServedWhole_AndEventsMatchTheCache) {
  EXPECT_TRUE(rc::check([] {
    const auto num_blocks = *rc::gen::inRange<std::int32_t>(8, 30);
    Engine engine(num_blocks, 4, *rc::gen::inRange<std::int32_t>(1, 40), *rc::gen::inRange<std::int32_t>(1, 6));
    const std::int32_t room = (num_blocks - 1) * 4;
    std::vector<std::shared_ptr<Request>> requests;
    const auto num_requests = *rc::gen::inRange(1, 25);
    for (int i = 0; i < num_requests; ++i) {
      const auto length = *rc::gen::inRange<std::int32_t>(1, room);
      // Few starts: prefixes are shared; the last token tells some of them apart.
      auto prompt = tokens(length, *rc::gen::inRange<Token>(0, 3) * 1000);
      if (*rc::gen::arbitrary<bool>()) prompt.back() = 5;
      requests.push_back(engine.add(prompt, *rc::gen::inRange<std::int32_t>(1, std::min(20, room - length + 1) + 1)));
      if (*rc::gen::arbitrary<bool>()) engine.step();
      if (*rc::gen::inRange(0, 10) == 0) {
        engine.scheduler.cancel(*requests.back());
        requests.pop_back();
      }
    }
    for (int i = 0; i < 50'000 && engine.scheduler.has_work(); ++i) engine.step();
    RC_ASSERT(!engine.scheduler.has_work());
    RC_ASSERT(engine.scheduler.kv_usage() == 0.0);
    for (const auto& request : requests) {
      RC_ASSERT(request->num_output_tokens() == request->max_tokens);
      RC_ASSERT(request->num_cached_tokens % 4 == 0 && request->num_cached_tokens < request->num_prompt_tokens);
    }
    // Removals of a prefix are told for each of its blocks, so the events may deny what a duplicate still holds; they
    // never claim what is not there.
    for (const BlockHash hash : held(engine.events())) {
      RC_ASSERT(engine.scheduler.blocks().pool().find(hash) >= 0);
    }
  }));
}

}  // namespace
}  // namespace kvrouter::sim
