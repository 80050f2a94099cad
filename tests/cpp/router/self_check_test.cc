// The router's belief against what a worker reports, for each cause that is told apart.  A worker's events come over a
// socket, as they do in service; its hits are reported as its callers would.
#include "router/self_check.h"

#include <gtest/gtest.h>

#include <memory>
#include <set>

#include "events/batch_builder.h"
#include "router/fake_publisher.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::cleared_map;
using testing::eventually;
using testing::pair;
using testing::Publisher;
using testing::removed_map;
using testing::stored_map;
using testing::StoredFields;

constexpr std::size_t kBlock = 4;
constexpr std::size_t kPromptBlocks = 8;
constexpr std::size_t kPromptTokens = kBlock * kPromptBlocks + 1;

// Prompts that share nothing; block k of prompt n is called n * 100 + k + 1 by the engine.
std::vector<TokenId> prompt(std::uint32_t number) {
  std::vector<TokenId> tokens(kPromptTokens);
  for (std::uint32_t i = 0; i < kPromptTokens; ++i) tokens[i] = number * 1000 + i;
  return tokens;
}

StoredFields stored(std::uint32_t number, std::uint32_t from = 0) {
  StoredFields fields;
  const auto tokens = prompt(number);
  for (std::uint64_t k = from; k < kPromptBlocks; ++k) fields.hashes.push_back(number * 100 + k + 1);
  if (from > 0) fields.parent = number * 100 + from;
  fields.tokens.assign(tokens.begin() + from * kBlock, tokens.begin() + kPromptBlocks * kBlock);
  fields.block_size = kBlock;
  return fields;
}

std::vector<LocalHash> hashes_of(std::uint32_t number) {
  std::vector<LocalHash> hashes(kPromptBlocks);
  const std::vector<TokenId> tokens = prompt(number);
  hash_blocks(std::span(tokens).first(kPromptBlocks * kBlock), kBlock, 0, hashes);
  return hashes;
}

class SelfCheckTest : public ::testing::Test {
 protected:
  SelfCheckTest() {
    RouterOptions options;
    options.block_size = kBlock;
    options.workers = {{publisher_.endpoint(), "", ""}};
    router_ = std::make_unique<Router>(options);
    router_->start();
    EXPECT_TRUE(eventually([&] { return status().state == WorkerState::kUp; }));
  }

  WorkerStatus status() { return router_->status().workers[0]; }

  void publish(const std::vector<std::string>& events) {
    const std::uint64_t before = status().events.batches;
    publisher_.send_batch(sequence_++, batch_of(events));
    ASSERT_TRUE(eventually([&] { return status().events.batches > before; }));
  }

  // One window of requests for prompts 0, 1, 2..., of which each finds `cached` tokens.
  void report_window(std::size_t cached, bool with_hashes = true) {
    for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {
      const auto hashes = hashes_of(n);
      const Decision decision = router_->explain(hashes, kPromptTokens);
      HitReport report{decision.choice.overlap_blocks, kPromptTokens, cached, {}};
      if (with_hashes) report.blocks = hashes;
      router_->report_hit(0, report);
    }
  }
  void store_prompts(const std::string& extra = "", std::size_t num_extra = 0, std::uint32_t from = 0) {
    std::vector<std::string> events;
    for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n)
      events.push_back(stored_map(stored(n, from), extra, num_extra));
    publish(events);
  }

  HitCause cause() { return status().hits.cause; }
  // What was told of hits since the last call.
  std::vector<std::string> told() {
    std::vector<std::string> texts;
    while (const auto notice = router_->next_notice(std::chrono::milliseconds(0))) {
      if (notice->text.find("hits its cache") != std::string::npos) texts.push_back(notice->text);
    }
    return texts;
  }

  static constexpr std::size_t kAll = kPromptBlocks * kBlock;
  zmq::context_t zmq_;
  Publisher publisher_{zmq_};
  std::uint64_t sequence_ = 0;
  std::unique_ptr<Router> router_;
};

TEST_F(SelfCheckTest, BeliefThatIsTrue_IsNotRemarkedOn) {
  store_prompts();
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kNone);
  EXPECT_TRUE(told().empty());
  const HitCheckStatus hits = status().hits;
  EXPECT_EQ(hits.reports, SelfCheck::kWindow);
  EXPECT_EQ(hits.predicted_tokens, SelfCheck::kWindow * kAll);
  EXPECT_EQ(hits.cached_tokens, hits.predicted_tokens);
  EXPECT_EQ(hits.missing_tokens + hits.surplus_tokens, 0u);
}

TEST_F(SelfCheckTest, LastTokenOfACachedPrompt_IsNoMiss) {
  publish({stored_map(stored(0))});
  const auto hashes = hashes_of(0);
  for (std::uint64_t n = 0; n < SelfCheck::kWindow; ++n) {
    const auto blocks = std::span(hashes);
    router_->report_hit(0, {kPromptBlocks, kAll, kAll - kBlock, blocks});  // exactly eight blocks: the last is computed
  }
  EXPECT_EQ(status().hits.missing_tokens, 0u);
}

TEST_F(SelfCheckTest, Episode_IsToldOnceWithItsEnd) {
  store_prompts();
  for (int i = 0; i < 3; ++i) report_window(0);
  EXPECT_EQ(told().size(), 1u);
  EXPECT_EQ(status().hits.episodes, 1u);
  report_window(kAll);
  const auto end = told();
  ASSERT_EQ(end.size(), 1u);
  EXPECT_NE(end[0].find("as predicted again"), std::string::npos);
  report_window(0);
  EXPECT_EQ(status().hits.episodes, 2u);
}

TEST_F(SelfCheckTest, CacheClearedLate_IsTheCauseOfMissingHits) {
  store_prompts();
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {  // the cache is empty, and the worker says so in between
    if (n == SelfCheck::kWindow / 2) publish({cleared_map()});
    const auto hashes = hashes_of(n);
    const Decision decision = router_->explain(hashes, kPromptTokens);
    router_->report_hit(0, {decision.choice.overlap_blocks, kPromptTokens, 0, hashes});
  }
  EXPECT_EQ(cause(), HitCause::kClearedLate);
  const auto texts = told();
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_NE(texts[0].find("until_cleared"), std::string::npos);
}

TEST_F(SelfCheckTest, OtherGroupsOfAHybridModel_ShortenHits) {
  store_prompts(pair("kv_cache_spec_kind", "full_attention"), 1);
  publish({stored_map(stored(0), pair("kv_cache_spec_kind", "sliding_window"), 1)});
  report_window(kBlock);
  EXPECT_EQ(cause(), HitCause::kOtherGroups);
  EXPECT_NE(told().at(0).find("--disable-hybrid-kv-cache-manager"), std::string::npos);
}

TEST_F(SelfCheckTest, SlidingWindowModel_OfWhichNothingIsIndexed) {
  store_prompts(pair("kv_cache_spec_kind", "sliding_window"), 1);
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kOtherGroups);
}

TEST_F(SelfCheckTest, EvictionBeforeArrival) {
  store_prompts();
  std::vector<Decision> decisions;
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n)
    decisions.push_back(router_->explain(hashes_of(n), kPromptTokens));
  std::vector<std::string> events;
  for (std::uint64_t n = 0; n < SelfCheck::kWindow; ++n) {
    std::vector<std::uint64_t> removed;
    for (std::uint64_t k = kPromptBlocks; k > 0; --k) removed.push_back(n * 100 + k);
    events.push_back(removed_map(removed));
  }
  publish(events);
  for (const Decision& decision : decisions) {
    router_->report_hit(0, {decision.choice.overlap_blocks, kPromptTokens, 0, {}});
  }
  EXPECT_EQ(cause(), HitCause::kEvicted);
  EXPECT_NE(told().at(0).find("--gpu-memory-utilization"), std::string::npos);
}

TEST_F(SelfCheckTest, RequestsOfAnAdapterThatTheRouterWasNotTold) {
  store_prompts();  // of the base model; the requests that follow name an adapter, and share nothing with it
  report_window(0);
  EXPECT_EQ(cause(), HitCause::kOtherNamespace);
  EXPECT_NE(told().at(0).find("lora_name"), std::string::npos);
}

TEST_F(SelfCheckTest, BlocksOfAnAdapter_AreNotFoundWithoutItsName) {
  store_prompts(pair("lora_name", "sql"), 1);
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kOtherNamespace);
}

TEST_F(SelfCheckTest, BlocksUnderACacheSalt_AreNotFoundWithoutIt) {
  std::vector<std::string> events;
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {
    std::string keys;
    MsgpackWriter writer(keys);
    writer.str("extra_keys");
    writer.array(kPromptBlocks);
    for (std::size_t k = 0; k < kPromptBlocks; ++k) {
      if (k > 0) {
        writer.nil();
      } else {  // vLLM salts the first block, on which the others build
        writer.array(1);
        writer.str("tenant-7");
      }
    }
    events.push_back(stored_map(stored(n), keys, 1));
  }
  publish(events);
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kOtherNamespace);
  EXPECT_NE(told().at(0).find("cache_salt"), std::string::npos);
}

TEST_F(SelfCheckTest, NoEvents) {
  report_window(kAll, false);
  EXPECT_EQ(cause(), HitCause::kNoEvents);
  EXPECT_NE(told().at(0).find("--kv-events-config"), std::string::npos);
}

TEST_F(SelfCheckTest, OtherBlockSize) {
  StoredFields fields{{1}, std::nullopt, {1, 2, 3, 4, 5, 6, 7, 8}, 8};
  publish({stored_map(fields)});
  report_window(kAll, false);
  EXPECT_EQ(cause(), HitCause::kBlockSize);
  EXPECT_NE(told().at(0).find("--block-size"), std::string::npos);
}

TEST_F(SelfCheckTest, EventsThatWereLost) {
  publish({stored_map(stored(1000))});
  sequence_ += 5;
  publish({stored_map(stored(1001))});
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kLostEvents);
  EXPECT_NE(told().at(0).find("replay_endpoint"), std::string::npos);
}

TEST_F(SelfCheckTest, PrefixesFromBeforeTheRouterListened) {
  store_prompts("", 0, 4);  // the fourth block of each and what follows: the first ones were stored earlier
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kLateStart);
}

TEST_F(SelfCheckTest, BlocksInOtherMemory) {
  store_prompts(pair("medium", "CPU"), 1);
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kOtherMemory);
}

TEST_F(SelfCheckTest, OtherTokensThanTheWorkers) {
  publish({stored_map(stored(1000))});
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kOtherTokens);
  EXPECT_NE(told().at(0).find("chat template"), std::string::npos);
}

TEST_F(SelfCheckTest, EventsThatCannotBeRead) {
  publisher_.send_batch(sequence_++, "nonsense");
  ASSERT_TRUE(eventually([&] { return status().events.malformed_batches == 1; }));
  report_window(kAll, false);
  EXPECT_EQ(cause(), HitCause::kUnreadable);
}

// The samples of a group are decided before the first of them has stored anything, and all the others hit.
TEST_F(SelfCheckTest, PrefixesOnTheirWay_AreNoDivergence) {
  publish({stored_map(stored(1000))});
  std::vector<Decision> decisions;
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n)
    decisions.push_back(router_->explain(hashes_of(n), kPromptTokens));
  store_prompts();
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {
    const auto hashes = hashes_of(n);
    router_->report_hit(0, {decisions[n].choice.overlap_blocks, kPromptTokens, kAll, hashes});
  }
  EXPECT_EQ(status().hits.surplus_tokens, SelfCheck::kWindow * kAll);
  EXPECT_EQ(cause(), HitCause::kNone);
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {
    router_->report_hit(0, {0, kPromptTokens, kAll, {}});  // nor where it cannot be told
  }
  EXPECT_EQ(cause(), HitCause::kNone);
}

// A restart with another hash seed gives every block another name; names are never compared, so nothing is amiss.
TEST_F(SelfCheckTest, OtherHashSeedAfterARestart_IsNoDivergence) {
  store_prompts();
  publish({stored_map(stored(1000))});
  sequence_ = 0;
  std::vector<std::string> events;
  for (std::uint32_t n = 0; n < SelfCheck::kWindow; ++n) {
    StoredFields fields = stored(n);
    for (std::uint64_t& hash : fields.hashes) hash ^= 0xABCDEF0000;
    events.push_back(stored_map(fields));
  }
  publish(events);
  EXPECT_EQ(status().restarts, 1u);
  report_window(kAll);
  EXPECT_EQ(cause(), HitCause::kNone);
  EXPECT_EQ(status().hits.surplus_tokens + status().hits.missing_tokens, 0u);
}

TEST_F(SelfCheckTest, AnotherWorkerInTheSlot_StartsAnew) {
  store_prompts();
  report_window(0);
  ASSERT_NE(cause(), HitCause::kNone);
  router_->set_worker(0, {publisher_.endpoint(), "", ""});
  EXPECT_EQ(status().hits.reports, 0u);
  EXPECT_EQ(cause(), HitCause::kNone);
}

TEST(SelfCheck, IndexThatGaveBlocksUp_IsNamed) {
  SelfCheck::Window window;
  window.requests = SelfCheck::kWindow;
  window.prompt_tokens = 1000;
  window.surplus_tokens = window.unknown_tokens = 500;
  HitEvidence before, after;
  after.events.batches = 1;
  after.given_up_blocks = 10;
  EXPECT_EQ(SelfCheck::judge(window, before, after, 4), HitCause::kIndexLimit);
  window.surplus_tokens = window.unknown_tokens = 100;
  EXPECT_EQ(SelfCheck::judge(window, before, after, 4), std::nullopt);
}

TEST_F(SelfCheckTest, TotalsOfManyRequests_AreJudgedAsOne) {
  store_prompts();
  router_->report_hits(0, {200, 10'000, 8'000, 8'100});
  EXPECT_EQ(cause(), HitCause::kNone);
  router_->report_hits(0, {200, 10'000, 8'000, 0});
  EXPECT_EQ(cause(), HitCause::kOtherNamespace);
  EXPECT_EQ(status().hits.reports, 400u);
  EXPECT_EQ(status().hits.missing_tokens, 8'000u);
  EXPECT_EQ(status().hits.surplus_tokens, 100u);
}

TEST(SelfCheck, EveryCause_HasANameOfItsOwn) {
  EXPECT_EQ(name_of(HitCause::kNone), "");
  std::set<std::string_view> names;
  for (int cause = 0; cause <= static_cast<int>(HitCause::kUnknown); ++cause) {
    names.insert(name_of(static_cast<HitCause>(cause)));
  }
  EXPECT_EQ(names.size(), static_cast<std::size_t>(HitCause::kUnknown) + 1);
}

}  // namespace
}  // namespace kvrouter
