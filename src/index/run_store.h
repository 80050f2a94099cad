// Where the blocks of the tree lie: each run of blocks contiguous, and never moved.
//
// A block has a number; its local hash, its engine hash and the node it belongs to are columns, indexed by it.  Readers
// walk local hashes only.  A run that is freed may be overwritten while a slow reader still walks it: the reader finds
// out from its node's version (node.h), and until then reads wrong numbers, but mapped memory.
//
// Space is handed out in units of four blocks.  A unit may be shared by the two sides of a split; it is free when no
// side uses it.  Free extents are joined with their neighbours at once.  Writer only, except for local hashes.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "index/arena.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {

using BlockId = std::uint32_t;
using NodeId = std::uint32_t;

class RunStore {
 public:
  static constexpr unsigned kBlockBits = 28;         // of a block's number
  static constexpr std::uint32_t kMaxRun = 1 << 14;  // blocks

  // Room for `blocks` blocks, rounded up to units: the first block, which begins a unit.
  // Throws std::bad_alloc when all block numbers are in use.
  // REQUIRES: 0 < blocks <= kMaxRun.
  BlockId allocate(std::uint32_t blocks);
  // Takes the units behind `end` (a unit's end) if they are free, up to `blocks` blocks; how many blocks were gained.
  std::uint32_t extend(BlockId end, std::uint32_t blocks);
  // The run around `at` becomes two, the second of which begins at `at`; each is released on its own.
  void split(BlockId at);
  // Gives up [begin, end) of a run, where `begin` is the run's first block or begins a unit.
  void release(BlockId begin, BlockId end);

  // Blocks in units that are in use, and the bytes that each takes here.
  std::size_t used_blocks() const { return std::size_t{used_units_} * kUnit; }
  static constexpr double kBytesPerBlock = 20.75;

  static std::uint32_t round_up(std::uint32_t blocks) { return (blocks + kUnit - 1) / kUnit * kUnit; }

  std::atomic<LocalHash>* locals(BlockId block) const { return local_.data() + block; }
  EngineHash& engine(BlockId block) { return engine_[block]; }
  EngineHash engine(BlockId block) const { return engine_[block]; }
  NodeId& node(BlockId block) { return node_[block]; }
  const NodeId& node(BlockId block) const { return node_[block]; }

 private:
  static constexpr std::uint32_t kUnit = 4;
  static constexpr std::uint32_t kMaxUnits = (1u << kBlockBits) / kUnit;
  static constexpr std::uint32_t kChunkUnits = 1 << 14;  // an extent lies within a chunk
  static constexpr std::uint32_t kExactBins = 64;        // extents of 1 to 64 units have bins of their own
  static constexpr std::uint32_t kBins = kExactBins + 16;
  static constexpr std::uint32_t kNone = ~0u;
  static_assert(std::atomic<LocalHash>::is_always_lock_free);

  // Links of the list of free extents: in the node column of a free extent's first unit, which nobody else uses.
  std::uint32_t& previous(std::uint32_t unit) { return node_[unit * kUnit]; }
  std::uint32_t& next(std::uint32_t unit) { return node_[unit * kUnit + 1]; }

  static std::uint32_t bin_of(std::uint32_t units);
  void give_back(std::uint32_t unit, std::uint32_t units);    // joins neighbours
  void insert_free(std::uint32_t unit, std::uint32_t units);  // as it is
  void remove_free(std::uint32_t unit);
  void take(std::uint32_t unit, std::uint32_t extent_units, std::uint32_t units);
  std::uint32_t find_free(std::uint32_t units);
  void add_chunk();

  Arena<std::atomic<LocalHash>> local_{(std::size_t{1} << kBlockBits) + kMaxRun};
  Arena<EngineHash> engine_{std::size_t{1} << kBlockBits};
  Arena<NodeId> node_{std::size_t{1} << kBlockBits};
  Arena<std::uint8_t> users_{kMaxUnits};             // of each unit; 0: free
  Arena<std::uint16_t> extent_{kMaxUnits};           // at both ends of a free extent: its length in units
  alignas(kCacheLine) std::uint32_t num_units_ = 0;  // not beside what readers read
  std::uint32_t used_units_ = 0;
  std::array<std::uint32_t, kBins> bins_ = [] {
    std::array<std::uint32_t, kBins> bins{};
    bins.fill(kNone);
    return bins;
  }();
  std::array<std::uint64_t, (kBins + 63) / 64> filled_{};  // one bit a bin
};

}  // namespace kvrouter
