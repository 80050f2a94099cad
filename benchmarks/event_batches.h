// Raw KV-event batches as vLLM workers publish them, for bench_decode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvrouter/prefix_index.h"

namespace kvrouter::bench {

struct RawBatch {
  WorkerId worker;
  std::string payload;
};

struct BatchList {
  std::size_t num_workers = 0;
  std::size_t stored_blocks = 0;  // 0 when not known beforehand
  std::size_t removed_blocks = 0;
  std::vector<RawBatch> batches;

  std::size_t bytes() const;
};

enum class Layout { kMap, kArray };

inline constexpr std::size_t kBlockSize = 64;

struct BatchOptions {
  Layout layout = Layout::kMap;
  std::size_t num_workers = 8;
  std::size_t stored_blocks = 100'000;  // at least so many
  std::size_t capacity = 0;             // blocks a worker caches before it evicts the oldest ones; 0: no limit
};

// Batches of one BlockStored event of 1 to 32 blocks each, preceded by a BlockRemoved event where the worker's cache is
// full.  Token ids are spread over a vocabulary of 150,000, engine hashes over 64 bits.  About half of the events start
// a sequence, the others go on with the worker's last one.
BatchList make_batches(const BatchOptions& options);

// The batches of a recorded session with two workers (tests/golden: u32 number of frames, then each frame's u32 length
// and bytes).  Throws std::runtime_error for a file that is none.
BatchList read_recording(const std::string& path);

}  // namespace kvrouter::bench
