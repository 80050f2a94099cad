#include "kvrouter/prefix_index.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <atomic>
#include <thread>

#include "index/flat_map.h"
#include "index/naive_index.h"

namespace kvrouter {
namespace {

using Overlap = std::vector<std::uint32_t>;

Overlap find(const PrefixIndex& index, const std::vector<LocalHash>& blocks) {
  Overlap overlap(index.num_workers(), 99);
  index.find_matches(blocks, overlap);
  return overlap;
}

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

// A small universe of prefixes, so that operations meet: prefix = path of 1 to 4 locals out of 3.  An engine names a
// prefix by a hash of it and of the worker, as real engines with seeds of their own do.
using Path = std::vector<LocalHash>;

EngineHash engine_name(WorkerId worker, const Path& path) {
  EngineHash name = 1469598103934665603ull + worker;
  for (const LocalHash local : path) name = (name ^ local) * 1099511628211ull;
  return name;
}

struct Op {
  int kind;  // 0-3 store, 4-5 remove, 6 clear, 7 find
  WorkerId worker;
  Path path;
  std::size_t from;  // store: blocks before it are taken for stored already
};

rc::Gen<Op> gen_op(WorkerId num_workers) {
  return rc::gen::map(
      rc::gen::tuple(rc::gen::inRange(0, 40), rc::gen::inRange<WorkerId>(0, num_workers),
                     rc::gen::container<Path>(rc::gen::inRange<LocalHash>(1, 4)), rc::gen::inRange<std::size_t>(0, 4)),
      [](const auto& t) {
        auto [kind, worker, path, from] = t;
        if (path.empty()) path.push_back(1);
        if (path.size() > 5) path.resize(5);
        return Op{kind < 20 ? 0 : kind < 30 ? 4 : kind < 31 ? 6 : 7, worker, path, from % path.size()};
      });
}

template <typename Index>
void apply(Index& index, const Op& op) {
  const auto prefix = [&](std::size_t n) { return Path(op.path.begin(), op.path.begin() + static_cast<long>(n)); };
  if (op.kind == 0) {
    std::vector<StoredBlock> blocks;
    for (std::size_t i = op.from; i < op.path.size(); ++i) {
      blocks.push_back({op.path[i], engine_name(op.worker, prefix(i + 1))});
    }
    std::optional<EngineHash> parent;
    if (op.from > 0) parent = engine_name(op.worker, prefix(op.from));
    index.store(op.worker, parent, blocks);
  } else if (op.kind == 4) {
    const std::vector<EngineHash> blocks = {engine_name(op.worker, prefix(op.from + 1))};
    index.remove(op.worker, blocks);
  } else if (op.kind == 6) {
    index.clear(op.worker);
  }
}

RC_GTEST_PROP(PrefixIndexProperty, AnswersAsTheNaiveModel_InEveryOrderOfEvents, ()) {
  const WorkerId num_workers = *rc::gen::element<WorkerId>(1, 3, 70);
  const auto ops = *rc::gen::container<std::vector<Op>>(gen_op(num_workers));
  PrefixIndex index(num_workers);
  NaiveIndex naive(num_workers);
  for (const Op& op : ops) {
    apply(index, op);
    apply(naive, op);
    RC_ASSERT(find(index, op.path) == naive.find_matches(op.path));
  }
  for (const Op& op : ops) RC_ASSERT(find(index, op.path) == naive.find_matches(op.path));
  for (WorkerId w = 0; w < num_workers; ++w) index.clear(w);
  RC_ASSERT(index.stats().blocks == 0u);
  RC_ASSERT(index.stats().pairs == 0u);
}

// Readers beside a writer: every event is seen whole.  Chain A-B-C of one event is held fully or not at all.
TEST(PrefixIndex, ReadersBesideAWriter_NeverSeeHalfAnEvent) {
  PrefixIndex index(4);
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&] {
      while (!stop) {
        for (const std::uint32_t depth : find(index, {1, 2, 3})) {
          if (depth != 0 && depth != 3) ++torn;
        }
      }
    });
  }
  for (int i = 0; i < 3000; ++i) {
    const auto w = static_cast<WorkerId>(i % 4);
    store(index, w, std::nullopt, {{1, 101}, {2, 102}, {3, 103}});
    if (i % 2) {
      remove(index, w, {101, 102, 103});
    } else {
      index.clear(w);
    }
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn, 0);
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
