// The prompts' beginnings that most requests share: what the prefix tree is worked hardest for.
//
// Counts prefixes of 1, 4, 16 and 64 blocks; where there are more than it may keep, the rarest gives way to the new one
// (the "space saving" sketch of Metwally, Agrawal and El Abbadi, 2005), so that a count is never too small.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kvrouter/policy.h"
#include "kvrouter/router.h"

namespace kvrouter {

class HotPrefixes {
 public:
  static constexpr std::size_t kKept = 128;
  struct Entry {
    PrefixHash prefix = 0;
    std::size_t blocks = 0;
    std::uint64_t requests = 0;
    std::size_t holders = 0;  // workers that held it at the last decision
  };

  void record(std::span<const LocalHash> blocks, const Decision& decision) {
    prefixes_.resize(blocks.size());
    hash_prefixes(blocks, prefixes_);
    for (std::size_t depth = 1; depth <= blocks.size() && depth <= 64; depth *= 4) {
      Entry& entry = find(prefixes_[depth - 1]);
      ++entry.requests;
      entry.blocks = depth;
      entry.holders =
          static_cast<std::size_t>(std::count_if(decision.overlap_blocks.begin(), decision.overlap_blocks.end(),
                                                 [&](std::uint32_t held) { return held >= depth; }));
    }
  }

  // The `count` with the most requests, those first.
  std::vector<Entry> hottest(std::size_t count) const {
    std::vector<Entry> sorted = entries_;
    std::sort(sorted.begin(), sorted.end(), [](const Entry& a, const Entry& b) {
      return a.requests != b.requests ? a.requests > b.requests : a.blocks > b.blocks;
    });
    sorted.resize(std::min(count, sorted.size()));
    return sorted;
  }

 private:
  Entry& find(PrefixHash prefix) {
    Entry* rarest = nullptr;
    for (Entry& entry : entries_) {
      if (entry.prefix == prefix) return entry;
      if (!rarest || entry.requests < rarest->requests) rarest = &entry;
    }
    if (entries_.size() < kKept) return entries_.emplace_back(Entry{prefix, 0, 0, 0});
    rarest->prefix = prefix;
    return *rarest;
  }

  std::vector<Entry> entries_;
  std::vector<PrefixHash> prefixes_;  // scratch
};

}  // namespace kvrouter
