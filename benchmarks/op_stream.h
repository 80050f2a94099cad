// An op stream: what a router's index sees of a fleet, as benchmarks/make_ops.py writes it (the format is described
// there).  Loaded as a whole and laid out so that replaying it costs nothing but the index's own work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvrouter/prefix_index.h"

namespace kvrouter::bench {

struct Op {
  enum class Kind : std::uint8_t { kStore = 1, kRemove = 2, kFind = 3, kClear = 4 };

  Kind kind;
  WorkerId worker;
  std::optional<EngineHash> parent;       // of a store
  std::span<const StoredBlock> stored;    // of a store
  std::span<const std::uint64_t> hashes;  // engine hashes of a removal, local hashes of a find

  bool is_event() const { return kind != Kind::kFind; }
  std::size_t num_blocks() const { return kind == Kind::kStore ? stored.size() : hashes.size(); }
};

class OpStream {
 public:
  // Throws std::runtime_error, saying what is wrong and where, for a file that is no op stream.
  explicit OpStream(const std::string& path);
  OpStream(const OpStream&) = delete;
  OpStream& operator=(const OpStream&) = delete;

  std::uint32_t block_size() const { return block_size_; }
  std::uint32_t num_workers() const { return num_workers_; }
  const std::vector<Op>& ops() const { return ops_; }
  std::size_t event_blocks() const;
  std::size_t find_blocks() const;
  std::size_t num_finds() const;

 private:
  std::uint32_t block_size_ = 0;
  std::uint32_t num_workers_ = 0;
  std::vector<Op> ops_;  // into the two below
  std::vector<StoredBlock> stored_;
  std::vector<std::uint64_t> hashes_;
};

// Applies an event.
// REQUIRES: op.is_event().
void apply(PrefixIndex& index, const Op& op);

// Adds one find's answer to a running checksum: FNV-1a over (worker, overlap) of the workers that hold something, in
// the order of their numbers, rotated in.
std::uint64_t add_to_checksum(std::uint64_t sum, std::span<const std::uint32_t> overlap);

std::string checksum_text(std::uint64_t sum);

}  // namespace kvrouter::bench
