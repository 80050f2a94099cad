#include "kvrouter/prefix_index.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "index/beside_a_writer.h"
#include "index/flat_map.h"

namespace kvrouter {
namespace {

void store(PrefixIndex& index, WorkerId worker, std::optional<EngineHash> parent, std::vector<StoredBlock> blocks) {
  index.store(worker, parent, blocks);
}

void remove(PrefixIndex& index, WorkerId worker, std::vector<EngineHash> blocks) {
  index.remove(worker, blocks);
}

TEST(PrefixIndex, Empty_MatchesNothing) {
  PrefixIndex index(2);
  EXPECT_EQ(find(index, {1, 2}), (Overlap{0, 0}));
  EXPECT_EQ(find(index, {}), (Overlap{0, 0}));
}

TEST(PrefixIndex, EachWorker_CountsItsOwnLeadingBlocks) {
  PrefixIndex index(3);
  store(index, 0, std::nullopt, {{1, 101}, {2, 102}, {3, 103}});
  store(index, 1, std::nullopt, {{1, 7}});
  EXPECT_EQ(find(index, {1, 2, 3, 4}), (Overlap{3, 1, 0}));
  EXPECT_EQ(find(index, {1, 2}), (Overlap{2, 1, 0}));
  EXPECT_EQ(find(index, {2, 3}), (Overlap{0, 0, 0}));
}

TEST(PrefixIndex, ChildOfAKnownParent_ExtendsTheMatch) {
  PrefixIndex index(1);
  store(index, 0, std::nullopt, {{1, 101}});
  store(index, 0, 101, {{2, 102}});
  EXPECT_EQ(find(index, {1, 2}), Overlap{2});
}

TEST(PrefixIndex, SecondStore_ChangesNothing) {
  PrefixIndex index(1);
  store(index, 0, std::nullopt, {{1, 101}, {2, 102}});
  store(index, 0, 101, {{2, 102}});
  EXPECT_EQ(index.stats().pairs, 2u);
  remove(index, 0, {102});
  EXPECT_EQ(find(index, {1, 2}), Overlap{1});
}

TEST(PrefixIndex, RemovedMiddleBlock_HidesItsDescendantsUntilItReturns) {
  PrefixIndex index(1);
  store(index, 0, std::nullopt, {{1, 101}, {2, 102}, {3, 103}});
  remove(index, 0, {102});
  EXPECT_EQ(find(index, {1, 2, 3}), Overlap{1});
  store(index, 0, 101, {{2, 102}});
  EXPECT_EQ(find(index, {1, 2, 3}), Overlap{3});
}

TEST(PrefixIndex, ChildStoredBeforeItsParent_CountsOnceTheParentIsThere) {
  PrefixIndex index(1);
  store(index, 0, 102, {{3, 103}, {4, 104}});
  EXPECT_EQ(find(index, {1, 2, 3, 4}), Overlap{0});
  EXPECT_EQ(index.stats().orphans, 2u);
  store(index, 0, 101, {{2, 102}});
  EXPECT_EQ(find(index, {1, 2, 3, 4}), Overlap{0});
  store(index, 0, std::nullopt, {{1, 101}});
  EXPECT_EQ(find(index, {1, 2, 3, 4}), Overlap{4});
  EXPECT_EQ(index.stats().orphans, 0u);
}

TEST(PrefixIndex, RemovedOrphan_DoesNotAppearWithItsParent) {
  PrefixIndex index(1);
  store(index, 0, 101, {{2, 102}, {3, 103}});
  remove(index, 0, {102});
  store(index, 0, std::nullopt, {{1, 101}});
  EXPECT_EQ(find(index, {1, 2, 3}), Overlap{1});
  store(index, 0, 101, {{2, 102}});
  EXPECT_EQ(find(index, {1, 2, 3}), Overlap{3});
}

TEST(PrefixIndex, Orphans_AreBounded) {
  PrefixIndex index(2);
  for (EngineHash i = 0; i < PrefixIndex::kMaxOrphansPerWorker + 10; ++i) store(index, 0, 1'000'000 + i, {{i, i}});
  store(index, 1, 5, {{1, 2}});
  EXPECT_EQ(index.stats().orphans, PrefixIndex::kMaxOrphansPerWorker + 1);
  EXPECT_EQ(index.stats().orphans_dropped, 10u);
}

TEST(PrefixIndex, EngineHashes_MeanNothingAcrossWorkers) {
  PrefixIndex index(2);
  store(index, 0, std::nullopt, {{1, 101}});
  store(index, 1, 101, {{2, 102}});  // worker 1 has no block 101
  EXPECT_EQ(find(index, {1, 2}), (Overlap{1, 0}));
  remove(index, 1, {101});
  EXPECT_EQ(find(index, {1, 2}), (Overlap{1, 0}));
}

TEST(PrefixIndex, Clear_EmptiesOneWorkerOnly) {
  PrefixIndex index(2);
  store(index, 0, std::nullopt, {{1, 101}, {2, 102}});
  store(index, 1, std::nullopt, {{1, 101}});
  index.clear(0);
  EXPECT_EQ(find(index, {1, 2}), (Overlap{0, 1}));
  index.clear(1);
  EXPECT_EQ(index.stats().blocks, 0u);
  EXPECT_EQ(index.stats().pairs, 0u);
}

TEST(PrefixIndex, TwoNamesForOnePrefix_HoldItUntilBothAreRemoved) {
  PrefixIndex index(1);
  store(index, 0, std::nullopt, {{1, 101}});
  store(index, 0, std::nullopt, {{1, 201}});
  remove(index, 0, {101});
  EXPECT_EQ(find(index, {1}), Overlap{1});
  remove(index, 0, {201});
  EXPECT_EQ(find(index, {1}), Overlap{0});
  EXPECT_EQ(index.stats().blocks, 0u);
}

TEST(PrefixIndex, EngineThatContradictsItself_IsHeldToItsLastWord) {
  PrefixIndex index(1);
  store(index, 0, std::nullopt, {{1, 101}});
  store(index, 0, std::nullopt, {{2, 101}});
  EXPECT_EQ(find(index, {1}), Overlap{0});
  EXPECT_EQ(find(index, {2}), Overlap{1});
  remove(index, 0, {101});
  EXPECT_EQ(index.stats().blocks, 0u);
}

TEST(PrefixIndex, UnknownRemovals_AreCountedAndHarmless) {
  PrefixIndex index(1);
  remove(index, 0, {1, 2, 3});
  EXPECT_EQ(index.stats().unknown_removals, 3u);
}

TEST(PrefixIndex, ManyWorkers_BeyondOneMachineWord) {
  PrefixIndex index(200);
  for (WorkerId w = 0; w < 200; w += 3) store(index, w, std::nullopt, {{1, w}, {2, 1000 + w}});
  for (WorkerId w = 0; w < 200; w += 6) remove(index, w, {1000 + w});
  const Overlap overlap = find(index, {1, 2});
  for (WorkerId w = 0; w < 200; ++w) EXPECT_EQ(overlap[w], w % 6 == 0 ? 1u : w % 3 == 0 ? 2u : 0u) << w;
}

// --- Against the naive model, in any order of events ---

void check_against_naive(WorkerId num_workers, const std::vector<Op>& ops, bool engines_agree) {
  PrefixIndex index(num_workers);
  NaiveIndex naive(num_workers);
  for (const Op& op : ops) {
    apply(index, op, engines_agree);
    apply(naive, op, engines_agree);
    RC_ASSERT(find(index, op.path) == naive.find_matches(op.path));
  }
  for (const Op& op : ops) RC_ASSERT(find(index, op.path) == naive.find_matches(op.path));
  for (WorkerId w = 0; w < num_workers; ++w) {
    RC_ASSERT(index.held_blocks(w) + index.stats().orphans >= naive.held_blocks(w));
    const std::vector<EngineHash> names = index.worker_blocks(w);
    RC_ASSERT(names.size() == naive.held(w).size());
    RC_ASSERT(std::set<EngineHash>(names.begin(), names.end()) == naive.held(w));
    index.clear(w);
  }
  RC_ASSERT(index.stats().blocks == 0u);
  RC_ASSERT(index.stats().pairs == 0u);
  RC_ASSERT(index.stats().contradictions == 0u);
}

RC_GTEST_PROP(PrefixIndexProperty, AnswersAsTheNaiveModel_InEveryOrderOfEvents, ()) {
  const WorkerId num_workers = *rc::gen::element<WorkerId>(1, 3, 9, 70);
  const auto ops = *rc::gen::scale(3.0, rc::gen::container<std::vector<Op>>(gen_op(num_workers)));
  check_against_naive(num_workers, ops, *rc::gen::arbitrary<bool>());
}

// Readers beside a writer: what a reader sees of a worker is what the worker held at some moment while it looked.
RC_GTEST_PROP(PrefixIndexProperty, ReadersBesideAWriter_SeeEventsWhole, ()) {
  constexpr WorkerId kWorkers = 5;
  const auto ops = *rc::gen::scale(4.0, rc::gen::container<std::vector<Op>>(gen_op(kWorkers)));
  const bool engines_agree = *rc::gen::arbitrary<bool>();
  if (ops.empty()) return;
  PrefixIndex index(kWorkers);
  RC_ASSERT(readers_see_only(index, ops, engines_agree, [](std::uint32_t seen, std::span<const std::uint32_t> held) {
    return std::find(held.begin(), held.end(), seen) != held.end();
  }));
}

RC_GTEST_PROP(FlatMap, BehavesAsAStdMap, ()) {
  const auto ops = *rc::gen::container<std::vector<std::tuple<bool, std::uint64_t>>>(
      rc::gen::tuple(rc::gen::arbitrary<bool>(), rc::gen::inRange<std::uint64_t>(0, 40)));
  FlatMap<int> map;
  std::map<std::uint64_t, int> expected;
  int value = 0;
  for (const auto& [insert, small] : ops) {
    const std::uint64_t key = small * 0x100000000ull;  // keys that differ in high bits only
    if (insert) {
      const auto [stored, fresh] = map.insert(key, ++value);
      RC_ASSERT(fresh == !expected.contains(key));
      *stored = value;
      expected[key] = value;
    } else {
      RC_ASSERT(map.erase(key) == (expected.erase(key) > 0));
    }
    RC_ASSERT(map.size() == expected.size());
    for (std::uint64_t k = 0; k < 40; ++k) {
      const int* found = map.find(k * 0x100000000ull);
      const auto wanted = expected.find(k * 0x100000000ull);
      RC_ASSERT((found != nullptr) == (wanted != expected.end()));
      if (found) RC_ASSERT(*found == wanted->second);
    }
  }
}

}  // namespace
}  // namespace kvrouter
