// From engine hash to block: a hash table that stores block numbers only; the hashes themselves stand in the run store.
//
// The table is cut into many small ones (shards) by the hash, each of which grows on its own: growth never stops the
// writer for long, and what one gives up another takes, so that growing does not touch twice the memory.  A shard is
// an array of groups of one cache line: ten blocks, with 16 bits of the hash of each.  A name has a home group; if
// that is full it is in the next one that is not, and each full group on the way counts how many have passed.  The 16
// bits also give the home, so a shard grows without looking at the names.  The hash is salted at random: nobody who
// chooses engine hashes can crowd a shard.  Writer only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

#include "index/huge_memory.h"
#include "index/run_store.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace kvrouter {

class NameTable {
 public:
  static constexpr BlockId kNone = ~BlockId{0};

  explicit NameTable(const RunStore& runs) : runs_(runs), shards_(std::make_unique<Shard[]>(kShards)) {
    std::random_device random;
    salt_ = std::uint64_t{random()} << 32 | random();
  }

  void prefetch(EngineHash name) const {
    const Key key(name, salt_);
    const Shard& shard = shards_[key.shard];
    if (shard.size) __builtin_prefetch(&shard.groups[shard.home(key.tag)]);
  }

  BlockId find(EngineHash name) const {
    const Key key(name, salt_);
    const Shard& shard = shards_[key.shard];
    return shard.size ? find_in(shard, key.tag, name) : kNone;
  }

  // Puts `name` in for `block`, unless it is there for another: then that one's number.  kNone: it was put in.
  // REQUIRES: runs.engine(block) == name by the time of the next call.
  BlockId insert(EngineHash name, BlockId block) {
    const Key key(name, salt_);
    Shard& shard = shards_[key.shard];
    if (shard.size) {
      const BlockId found = find_in(shard, key.tag, name);
      if (found != kNone) return found;
    }
    if ((shard.size + 1) * 100 > shard.num_groups * (kGroup * 85)) shard.grow();
    shard.put(key.tag, block);
    return kNone;
  }

  // Takes `name` out if it stands for `block`.
  void erase(EngineHash name, BlockId block) {
    const Key key(name, salt_);
    Shard& shard = shards_[key.shard];
    if (shard.size == 0) return;
    const std::uint32_t home = shard.home(key.tag);
    std::uint32_t g = home;
    for (std::uint32_t steps = 0; steps < shard.num_groups; ++steps, g = shard.next(g)) {
      Group& group = shard.groups[g];
      for (unsigned candidates = group.matches(key.tag); candidates; candidates &= candidates - 1) {
        const auto i = static_cast<unsigned>(__builtin_ctz(candidates));
        if (group.block[i] != block) continue;
        --group.count;
        group.tag[i] = group.tag[group.count];
        group.block[i] = group.block[group.count];
        --shard.size;
        for (std::uint32_t passed = home; passed != g; passed = shard.next(passed)) --shard.groups[passed].passed;
        return;
      }
      if (group.passed == 0) return;
    }
  }

 private:
  static constexpr unsigned kShardBits = 10;
  static constexpr std::size_t kShards = std::size_t{1} << kShardBits;
  static constexpr std::uint32_t kGroup = 10;

  struct Key {
    Key(EngineHash name, std::uint64_t salt) {
      name = (name ^ salt) * 0xD6E8FEB86659FD93ull;
      name = (name ^ (name >> 32)) * 0x9E3779B97F4A7C15ull;
      shard = static_cast<std::uint32_t>(name >> (64 - kShardBits));
      tag = static_cast<std::uint16_t>(name >> (64 - kShardBits - 16));
    }
    std::uint32_t shard;
    std::uint16_t tag;
  };

  struct alignas(64) Group {
    std::uint16_t tag[kGroup];
    std::uint16_t count;   // entries; the first of the arrays
    std::uint16_t passed;  // names that would be here or before, had there been room
    BlockId block[kGroup];

    // Bit i: entry i has this tag.
    unsigned matches(std::uint16_t wanted) const {
      unsigned found = 0;
#ifdef __SSE2__
      const __m128i all = _mm_set1_epi16(static_cast<short>(wanted));
      const __m128i low = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(tag)), all);
      const __m128i high = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(tag) + 1), all);
      found = static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
      for (unsigned i = 0; i < kGroup; ++i) found |= static_cast<unsigned>(tag[i] == wanted) << i;
#endif
      return found & ((1u << count) - 1);
    }
  };
  static_assert(sizeof(Group) == 64);

  struct Shard {
    std::unique_ptr<Group[], FreeMemory> groups;
    std::uint32_t num_groups = 0;
    std::uint32_t size = 0;

    std::uint32_t home(std::uint16_t tag) const { return (std::uint32_t{tag} * num_groups) >> 16; }
    std::uint32_t next(std::uint32_t group) const { return group + 1 == num_groups ? 0 : group + 1; }
    void put(std::uint16_t tag, BlockId block) {
      std::uint32_t g = home(tag);
      for (; groups[g].count == kGroup; g = next(g)) ++groups[g].passed;
      Group& group = groups[g];
      group.tag[group.count] = tag;
      group.block[group.count] = block;
      ++group.count;
      ++size;
    }
    // Homes keep their order when the number of groups changes, so this walks both arrays from front to back.
    void grow() {
      const std::uint32_t old_groups = num_groups;
      const auto old = std::move(groups);
      num_groups = old_groups + old_groups / 2 + 1;
      groups = allocate_memory<Group>(num_groups);
      for (std::uint32_t g = 0; g < num_groups; ++g) groups[g].count = groups[g].passed = 0;
      size = 0;
      for (std::uint32_t g = 0; g < old_groups; ++g) {
        for (unsigned i = 0; i < old[g].count; ++i) put(old[g].tag[i], old[g].block[i]);
      }
    }
  };

  BlockId find_in(const Shard& shard, std::uint16_t tag, EngineHash name) const {
    std::uint32_t g = shard.home(tag);
    for (std::uint32_t steps = 0; steps < shard.num_groups; ++steps, g = shard.next(g)) {
      const Group& group = shard.groups[g];
      for (unsigned candidates = group.matches(tag); candidates; candidates &= candidates - 1) {
        const BlockId block = group.block[__builtin_ctz(candidates)];
        if (runs_.engine(block) == name) return block;
      }
      if (group.passed == 0) break;
    }
    return kNone;
  }

  const RunStore& runs_;
  std::unique_ptr<Shard[]> shards_;
  std::uint64_t salt_;
};

}  // namespace kvrouter
