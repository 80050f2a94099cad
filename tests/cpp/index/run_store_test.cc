#include "index/run_store.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <map>
#include <random>

namespace kvrouter {
namespace {

struct Extent {
  std::uint32_t used;      // blocks that were asked for
  std::uint32_t capacity;  // to the end of the last unit
};

// Every block is in one run at most: each run's blocks carry its mark as long as it lives.
RC_GTEST_PROP(RunStore, RunsNeverOverlap_AndSpaceComesBack, ()) {
  RunStore runs;
  std::map<BlockId, Extent> live;
  std::mt19937_64 random(*rc::gen::arbitrary<std::uint64_t>());
  const auto steps = *rc::gen::inRange(0, 300);
  const auto longest = *rc::gen::element(4u, 40u, 3000u, RunStore::kMaxRun);
  const auto mark = [&](BlockId start) {
    for (std::uint32_t i = 0; i < live[start].capacity; ++i) runs.node(start + i) = start;
  };
  BlockId highest = 0;
  for (int step = 0; step < steps; ++step) {
    const unsigned what = random() % 4;
    auto some = live.begin();
    if (!live.empty()) std::advance(some, static_cast<std::ptrdiff_t>(random() % live.size()));
    if (live.empty() || what < 2) {
      const auto blocks = static_cast<std::uint32_t>(1 + random() % longest);
      const BlockId start = runs.allocate(blocks);
      RC_ASSERT(start % 4 == 0);
      live[start] = {blocks, RunStore::round_up(blocks)};
      mark(start);
      highest = std::max(highest, start + live[start].capacity);
    } else if (what == 2) {
      auto& [start, extent] = *some;
      for (std::uint32_t i = 0; i < extent.capacity; ++i) RC_ASSERT(runs.node(start + i) == start);
      runs.release(start, start + extent.capacity);
      live.erase(some);
    } else {
      auto& [start, extent] = *some;
      if (extent.capacity + 8 > RunStore::kMaxRun) continue;
      const std::uint32_t gained = runs.extend(start + extent.capacity, 8);
      RC_ASSERT(gained <= 8 && gained % 4 == 0);
      extent.capacity += gained;
      mark(start);
      highest = std::max(highest, start + extent.capacity);
    }
  }
  for (const auto& [start, extent] : live) {
    for (std::uint32_t i = 0; i < extent.capacity; ++i) RC_ASSERT(runs.node(start + i) == start);
    runs.release(start, start + extent.capacity);
  }
  // All is free, and joined again: the longest runs fit where there was anything before.
  if (highest > 0) RC_ASSERT(runs.allocate(RunStore::kMaxRun) < highest + RunStore::kMaxRun);
}

TEST(RunStore, UnitSharedByASplit_IsFreeWhenBothSidesAreGone) {
  RunStore runs;
  const BlockId start = runs.allocate(8);
  runs.split(start + 2);
  runs.release(start, start + 2);
  EXPECT_NE(runs.allocate(4), start);  // its other two blocks are in use
  runs.release(start + 2, start + 8);
  EXPECT_EQ(runs.allocate(8), start);
}

}  // namespace
}  // namespace kvrouter
