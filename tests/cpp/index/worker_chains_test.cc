// What a worker holds, told to another index.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "index/random_ops.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {
namespace {

constexpr WorkerId kWorkers = 3;

void copy(const PrefixIndex& from, PrefixIndex& to) {
  for (WorkerId w = 0; w < kWorkers; ++w) {
    for (const StoredChain& chain : from.worker_chains(w)) to.store(w, chain.parent, chain.blocks);
  }
}

std::vector<std::uint32_t> matches(const PrefixIndex& index, const Path& path) {
  std::vector<std::uint32_t> overlap(kWorkers);
  index.find_matches(path, overlap);
  return overlap;
}

void same_matches(const PrefixIndex& a, const PrefixIndex& b) {
  for (unsigned bits = 0; bits < 1u << kLongest; ++bits) {
    Path path;
    for (std::size_t i = 0; i < kLongest; ++i) path.push_back(1 + (bits >> i & 1));
    RC_ASSERT(matches(a, path) == matches(b, path));
  }
}

RC_GTEST_PROP(WorkerChains, AnotherIndexThatIsToldThemKnowsTheSame, ()) {
  PrefixIndex index(kWorkers);
  for (const Op& op : *rc::gen::container<std::vector<Op>>(gen_op(kWorkers))) apply(index, op, true);
  PrefixIndex told(kWorkers);
  copy(index, told);
  for (WorkerId w = 0; w < kWorkers; ++w) RC_ASSERT(told.worker_blocks(w) == index.worker_blocks(w));
  same_matches(told, index);
  // Also of what comes later: blocks behind a lost one count again once it is stored.
  for (const Op& op : *rc::gen::container<std::vector<Op>>(gen_op(kWorkers))) {
    apply(index, op, true);
    apply(told, op, true);
  }
  same_matches(told, index);
}

RC_GTEST_PROP(WorkerChains, EnginesWithNamesOfTheirOwn_MatchTheSame, ()) {
  PrefixIndex index(kWorkers);
  for (const Op& op : *rc::gen::container<std::vector<Op>>(gen_op(kWorkers))) apply(index, op, false);
  PrefixIndex told(kWorkers);
  copy(index, told);
  same_matches(told, index);
  for (WorkerId w = 0; w < kWorkers; ++w) {
    const auto all = index.worker_blocks(w), some = told.worker_blocks(w);
    RC_ASSERT(std::includes(all.begin(), all.end(), some.begin(), some.end()));
  }
}

TEST(WorkerChains, BlockWithTwoNames_KeepsBoth) {
  PrefixIndex index(kWorkers), told(kWorkers);
  index.store(0, std::nullopt, std::vector<StoredBlock>{{1, 11}, {2, 12}});
  index.store(0, 11, std::vector<StoredBlock>{{2, 99}});
  copy(index, told);
  EXPECT_EQ(told.worker_blocks(0), (std::vector<EngineHash>{11, 12, 99}));
  told.remove(0, std::vector<EngineHash>{12});
  EXPECT_EQ(matches(told, {1, 2})[0], 2u);  // by its other name it is still there
  told.remove(0, std::vector<EngineHash>{99});
  EXPECT_EQ(matches(told, {1, 2})[0], 1u);
}

TEST(WorkerChains, OrphansWaitInTheOtherIndexToo) {
  PrefixIndex index(kWorkers), told(kWorkers);
  index.store(1, 77, std::vector<StoredBlock>{{5, 78}});
  copy(index, told);
  EXPECT_EQ(told.stats().orphans, 1u);
  told.store(1, std::nullopt, std::vector<StoredBlock>{{4, 77}});
  EXPECT_EQ(matches(told, {4, 5})[1], 2u);
}

}  // namespace
}  // namespace kvrouter
