// The index under a memory limit: what goes first, and that what is left is true.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>

#include "index/beside_a_writer.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {
namespace {

// A prompt of `length` blocks that shares none with other prompts; its engine hashes are its local ones.
std::vector<LocalHash> prompt(std::size_t number, std::size_t length) {
  std::vector<LocalHash> blocks(length);
  for (std::size_t i = 0; i < length; ++i) blocks[i] = (number << 20) + i + 1;
  return blocks;
}

void store(PrefixIndex& index, WorkerId worker, std::span<const LocalHash> blocks, std::size_t from = 0,
           EngineHash seed = 0) {
  std::vector<StoredBlock> stored;
  for (const LocalHash block : blocks.subspan(from)) stored.push_back({block, block ^ seed});
  index.store(worker, from == 0 ? std::nullopt : std::optional(blocks[from - 1] ^ seed), stored);
}

constexpr std::size_t kLimit = 1 << 20;  // some 500 prompts of 64 blocks

TEST(MemoryLimit, PrefixesThatAreFound_OutliveThoseThatAreNot) {
  PrefixIndex index(2, kLimit);
  constexpr std::size_t kHot = 50, kPrompts = 3000;
  for (std::size_t n = 0; n < kPrompts; ++n) {
    store(index, n % 2, prompt(n, 64));
    for (std::size_t hot = 0; hot < std::min(n, kHot); ++hot) find(index, prompt(hot, 64));
    ASSERT_LE(index.stats().memory_bytes, kLimit);
  }
  std::size_t hot_left = 0, cold_left = 0, last_left = 0;
  for (std::size_t n = 0; n < kPrompts; ++n) {
    const bool whole = find(index, prompt(n, 64))[n % 2] == 64;
    hot_left += n < kHot && whole;
    cold_left += n >= kHot && n < kPrompts / 2 && whole;
    last_left += n >= kPrompts - 100 && whole;
  }
  EXPECT_EQ(hot_left, kHot);
  EXPECT_LE(cold_left, 2u);
  EXPECT_GE(last_left, 98u);  // the oldest of a few drawn at random is not always an old one
  EXPECT_GT(index.stats().given_up_blocks, 100'000u);
}

TEST(MemoryLimit, OfEquals_ThoseOfFewWorkersGoFirst) {
  PrefixIndex index(8, kLimit);
  for (std::size_t n = 0; n < 100; ++n) {
    for (WorkerId w = 0; w < 8; ++w) store(index, w, prompt(n, 64));
  }
  for (std::size_t n = 100; n < 450; ++n) store(index, 0, prompt(n, 64));
  ASSERT_EQ(index.stats().given_up_blocks, 0u);
  for (std::size_t n = 0; n < 450; ++n) find(index, prompt(n, 64));  // all at one tick of the clock
  for (std::size_t n = 450; index.stats().given_up_blocks < 50 * 64; ++n) {
    store(index, 0, prompt(n, 64));
    for (std::size_t m = 0; m < 450; ++m) find(index, prompt(m, 64));
  }
  std::size_t shared_left = 0;
  for (std::size_t n = 0; n < 100; ++n) shared_left += find(index, prompt(n, 64))[7] == 64;
  EXPECT_GE(shared_left, 98u);
}

TEST(MemoryLimit, ALongPrompt_IsGivenUpFromItsEnd) {
  PrefixIndex index(1, 64 << 10);
  const auto blocks = prompt(1, 5000);
  store(index, 0, blocks);
  const std::uint32_t left = find(index, blocks)[0];
  EXPECT_GT(left, 1000u);
  EXPECT_LT(left, 3000u);
  EXPECT_EQ(index.held_blocks(0), left);
  EXPECT_EQ(index.stats().given_up_blocks, 5000 - left);
  EXPECT_LE(index.stats().memory_bytes, 64u << 10);
}

TEST(MemoryLimit, LaterEventsOfWhatWasGivenUp_AreHarmless) {
  PrefixIndex index(1, 64 << 10);
  const auto blocks = prompt(1, 5000);
  store(index, 0, blocks);
  const std::uint32_t left = find(index, blocks)[0];
  const std::vector<EngineHash> last = {blocks[4999]};
  index.remove(0, last);
  EXPECT_EQ(index.stats().unknown_removals, 1u);

  auto longer = blocks;
  longer.push_back(77);
  store(index, 0, longer, 5000);  // its parent was given up
  EXPECT_EQ(index.stats().orphans, 1u);
  EXPECT_EQ(find(index, longer)[0], left);
  EXPECT_EQ(index.stats().contradictions, 0u);

  const auto other = prompt(2, 10);
  store(index, 0, other);
  store(index, 0, other, 5);
  EXPECT_EQ(find(index, other)[0], 10u);
}

TEST(MemoryLimit, OrphanAppears_WhenTheGivenUpBlockIsStoredAgain) {
  PrefixIndex index(1, kLimit);
  const auto first = prompt(0, 65);
  store(index, 0, std::span(first).first(64));
  for (std::size_t n = 1; n < 2000; ++n) store(index, 0, prompt(n, 64));
  ASSERT_EQ(find(index, first)[0], 0u);
  store(index, 0, first, 64);
  EXPECT_EQ(index.stats().orphans, 1u);
  store(index, 0, std::span(first).first(64));
  EXPECT_EQ(find(index, first)[0], 65u);
}

TEST(MemoryLimit, NamesOfWhatIsGivenUp_AreForgotten) {
  PrefixIndex index(3, kLimit);
  for (std::size_t n = 0; n < 2000; ++n) {
    const auto blocks = prompt(n, 32);
    store(index, 0, blocks);
    store(index, 1, blocks, 0, 1ull << 40);
    store(index, 1, blocks, 0, 1ull << 41);  // calls each block by two names
    store(index, 2, blocks, 0, 1ull << 42);
    ASSERT_LE(index.stats().memory_bytes, kLimit);
    ASSERT_EQ(index.held_blocks(0), index.held_blocks(1)) << n;
  }
  EXPECT_EQ(index.stats().contradictions, 0u);
  for (WorkerId w = 0; w < 3; ++w) index.clear(w);
  EXPECT_EQ(index.stats().memory_bytes, 0u);
}

TEST(MemoryLimit, OrphansAreBoundedByIt) {
  PrefixIndex index(2, kLimit);
  for (EngineHash n = 0; n < 10'000; ++n) store(index, 0, prompt(n, 2), 1);
  EXPECT_LE(index.stats().memory_bytes, kLimit / 16);
  EXPECT_GT(index.stats().orphans_dropped, 9'000u);
  EXPECT_GT(index.stats().orphans, 100u);
}

rc::Gen<std::size_t> gen_limit() {
  return rc::gen::element<std::size_t>(1, 400, 1000, 3000, 10'000);
}

RC_GTEST_PROP(MemoryLimitProperty, NeverOverReports_AndStaysBelow, ()) {
  const WorkerId num_workers = *rc::gen::element<WorkerId>(1, 3, 9, 70);
  const auto ops = *rc::gen::scale(4.0, rc::gen::container<std::vector<Op>>(gen_op(num_workers)));
  const bool engines_agree = *rc::gen::arbitrary<bool>();
  const std::size_t limit = *gen_limit();
  PrefixIndex index(num_workers, limit);
  NaiveIndex naive(num_workers);
  const auto check = [&](const Path& path) {
    const Overlap seen = find(index, path), truth = naive.find_matches(path);
    for (WorkerId w = 0; w < num_workers; ++w) RC_ASSERT(seen[w] <= truth[w]);
  };
  for (const Op& op : ops) {
    apply(index, op, engines_agree);
    apply(naive, op, engines_agree);
    RC_ASSERT(index.stats().memory_bytes <= limit);
    check(op.path);
    RC_ASSERT(index.held_blocks(op.worker) <= naive.held_blocks(op.worker));
  }
  for (const Op& op : ops) check(op.path);
  RC_ASSERT(index.stats().contradictions == 0u);
  for (WorkerId w = 0; w < num_workers; ++w) index.clear(w);
  RC_ASSERT(index.stats().memory_bytes == 0u);
  RC_ASSERT(index.stats().pairs == 0u);
}

RC_GTEST_PROP(MemoryLimitProperty, ReadersBesideAWriter_NeverSeeMoreThanWasHeld, ()) {
  constexpr WorkerId kWorkers = 5;
  const auto ops = *rc::gen::scale(4.0, rc::gen::container<std::vector<Op>>(gen_op(kWorkers)));
  const bool engines_agree = *rc::gen::arbitrary<bool>();
  if (ops.empty()) return;
  PrefixIndex index(kWorkers, *gen_limit());
  RC_ASSERT(readers_see_only(index, ops, engines_agree, [](std::uint32_t seen, std::span<const std::uint32_t> held) {
    return seen <= *std::max_element(held.begin(), held.end());
  }));
}

}  // namespace
}  // namespace kvrouter
