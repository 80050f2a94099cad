#include "router/routed_prefixes.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <vector>

namespace kvrouter {
namespace {

using Blocks = std::vector<LocalHash>;

std::vector<PrefixHash> prefixes_of(const Blocks& blocks) {
  std::vector<PrefixHash> prefixes(blocks.size());
  hash_prefixes(blocks, prefixes);
  return prefixes;
}

std::size_t common(const Blocks& a, const Blocks& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

// As deep as long prompts are kept.
std::uint32_t kept(std::size_t depth) {
  const std::size_t every = RoutedPrefixes::kEveryBlock;
  if (depth > every) depth = every + (depth - every) / RoutedPrefixes::kStride * RoutedPrefixes::kStride;
  return static_cast<std::uint32_t>(depth);
}

RC_GTEST_PROP(RoutedPrefixes, DepthIsTheLongestPrefixSentThere, ()) {
  const auto num_workers = *rc::gen::element<std::size_t>(1, 3, 64, 65, 130);
  // Some share a long beginning.
  const auto blocks = rc::gen::map(rc::gen::pair(rc::gen::inRange<std::size_t>(0, 60),
                                                 rc::gen::container<Blocks>(rc::gen::inRange<LocalHash>(0, 3))),
                                   [](const auto& drawn) {
                                     Blocks result(drawn.first, 9);
                                     result.insert(result.end(), drawn.second.begin(), drawn.second.end());
                                     return result;
                                   });
  struct Sent {
    Blocks blocks;
    WorkerId worker;
    int generation;
  };
  std::vector<Sent> sent;
  int generation = 0;
  RoutedPrefixes routed(7);
  routed.reset(num_workers);
  const auto steps = *rc::gen::inRange(0, 60);
  for (int i = 0; i < steps; ++i) {
    if (*rc::gen::inRange(0, 15) == 0) {
      routed.next_generation();
      ++generation;
    } else {
      sent.push_back({*blocks, *rc::gen::inRange<WorkerId>(0, static_cast<WorkerId>(num_workers)), generation});
      routed.add(prefixes_of(sent.back().blocks), sent.back().worker);
    }
    const Blocks asked = *blocks;
    std::vector<std::uint32_t> expected(num_workers, 1), depth(num_workers, 1);  // raised, never lowered
    for (const Sent& s : sent) {
      if (s.generation + 1 < generation) continue;
      expected[s.worker] = std::max(expected[s.worker], kept(common(asked, s.blocks)));
    }
    routed.raise(prefixes_of(asked), depth);
    RC_ASSERT(depth == expected);
  }
}

TEST(RoutedPrefixes, ResetForgets) {
  RoutedPrefixes routed(2);
  const std::vector<PrefixHash> prefixes = prefixes_of({1, 2, 3});
  routed.add(prefixes, 1);
  routed.reset(2);
  std::vector<std::uint32_t> depth(2, 0);
  routed.raise(prefixes, depth);
  EXPECT_EQ(depth, (std::vector<std::uint32_t>{0, 0}));
}

TEST(HashPrefixes, DependsOnAllBlocksUpToThere) {
  const auto a = prefixes_of({1, 2, 3}), b = prefixes_of({1, 2, 4}), c = prefixes_of({2, 1, 3});
  EXPECT_EQ(a[1], b[1]);
  EXPECT_NE(a[2], b[2]);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_NE(a[i], c[i]);
  EXPECT_NE(prefixes_of({0})[0], prefixes_of({0, 0})[1]);
}

TEST(RoutedPrefixes, TooManyOfThem_EndTheirGenerationEarly) {
  RoutedPrefixes routed(1);
  std::vector<std::uint32_t> depth(1);
  constexpr std::size_t kLength = 16;
  const auto prompt = [](std::uint64_t number) {
    std::vector<PrefixHash> prefixes(kLength);
    for (std::size_t i = 0; i < kLength; ++i) prefixes[i] = (number * kLength + i + 1) * 0x9E3779B97F4A7C15ull;
    return prefixes;
  };
  std::uint64_t number = 0;
  for (; routed.ended_early() < 2; ++number) {
    routed.add(prompt(number), 0);
    ASSERT_LE(number * kLength, RoutedPrefixes::kMaxSlots + 2 * kLength);
  }
  const auto depth_of = [&](std::uint64_t n) {
    depth[0] = 0;
    routed.raise(prompt(n), depth);
    return depth[0];
  };
  EXPECT_EQ(depth_of(number - 1), kLength);
  EXPECT_EQ(depth_of(number - 2), kLength);  // of the generation before
  EXPECT_EQ(depth_of(0), 0u);
}

}  // namespace
}  // namespace kvrouter
