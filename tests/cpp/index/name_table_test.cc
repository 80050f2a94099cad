#include "index/name_table.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <random>
#include <unordered_map>
#include <vector>

namespace kvrouter {
namespace {

// Inserts, erases and finds at random, names from a small set so that they come again: whether it answers as a std map.
bool behaves_as_a_map(std::size_t steps, std::uint64_t num_names, unsigned erase_percent, std::uint64_t seed) {
  RunStore runs;
  NameTable table(runs);
  std::unordered_map<EngineHash, BlockId> model;
  std::mt19937_64 random(seed);
  std::vector<BlockId> free;
  for (std::size_t step = 0; step < steps; ++step) {
    const EngineHash name = random() % num_names * 0x9E3779B97F4A7C15ull;
    const auto known = model.find(name);
    if (random() % 100 < erase_percent) {
      const BlockId block = known == model.end() ? 1 : known->second;
      table.erase(name, block);
      if (known != model.end()) {
        free.push_back(block);
        model.erase(known);
      }
    } else {
      if (free.empty()) {
        const BlockId unit = runs.allocate(4);
        for (BlockId i = 0; i < 4; ++i) free.push_back(unit + i);
      }
      const BlockId block = free.back();
      if (known == model.end()) runs.engine(block) = name;
      NameTable::Place place;
      table.find_place(name, place);
      const BlockId found = table.insert(place, name, block);
      if (found != (known == model.end() ? NameTable::kNone : known->second)) return false;
      if (known == model.end()) {
        model.emplace(name, block);
        free.pop_back();
      }
    }
  }
  for (std::uint64_t i = 0; i < num_names; ++i) {
    const EngineHash name = i * 0x9E3779B97F4A7C15ull;
    const auto known = model.find(name);
    if (table.find(name) != (known == model.end() ? NameTable::kNone : known->second)) return false;
  }
  return true;
}

RC_GTEST_PROP(NameTable, BehavesAsAMap, ()) {
  RC_ASSERT(behaves_as_a_map(*rc::gen::inRange<std::size_t>(0, 3000), *rc::gen::inRange<std::uint64_t>(1, 2000),
                             *rc::gen::inRange(0u, 70u), *rc::gen::arbitrary<std::uint64_t>()));
}

// Enough names for every shard to grow several times: in place, with entries that overflow from group to group.
TEST(NameTable, ThatHasGrownManyTimes_BehavesAsAMap) {
  EXPECT_TRUE(behaves_as_a_map(1'500'000, 800'000, 10, 1));
}

TEST(NameTable, NamesErasedForAnotherBlock_Stay) {
  RunStore runs;
  NameTable table(runs);
  const BlockId block = runs.allocate(4);
  runs.engine(block) = 7;
  NameTable::Place place;
  table.find_place(7, place);
  ASSERT_EQ(table.insert(place, 7, block), NameTable::kNone);
  table.erase(7, block + 1);
  EXPECT_EQ(table.find(7), block);
}

// A place that was looked up before the table grew is looked up anew.
TEST(NameTable, PlacesFromBeforeAGrowth_StayGood) {
  RunStore runs;
  NameTable table(runs);
  constexpr BlockId kNames = 400'000;
  std::vector<NameTable::Place> places(kNames);
  for (BlockId i = 0; i < kNames; ++i) table.find_place(i + 1, places[i]);
  for (BlockId i = 0; i < kNames; i += 4) {
    const BlockId unit = runs.allocate(4);
    for (BlockId j = 0; j < 4; ++j) {
      runs.engine(unit + j) = i + j + 1;
      ASSERT_EQ(table.insert(places[i + j], i + j + 1, unit + j), NameTable::kNone);
    }
  }
  for (BlockId i = 0; i < kNames; ++i) {
    const BlockId block = table.find(places[i], i + 1);
    ASSERT_NE(block, NameTable::kNone);
    ASSERT_EQ(runs.engine(block), i + 1);
  }
}

}  // namespace
}  // namespace kvrouter
