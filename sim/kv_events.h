// What the engine says of its prefix cache, in the order in which it happened.
//
// One flat buffer that is filled during a step, published, and cleared: no allocation once it has grown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvrouter::sim {

using Token = std::uint32_t;
using BlockHash = std::uint64_t;  // the engine's own name of a block and all before it

struct KvEvent {
  enum class Kind : std::uint8_t { kStored, kRemoved, kCleared };
  Kind kind;
  bool has_parent = false;
  BlockHash parent = 0;
  std::size_t first_hash = 0;  // into KvEvents::hashes
  std::size_t num_hashes = 0;
  std::size_t first_token = 0;  // into KvEvents::tokens; num_hashes x block_size of them when stored
};

struct KvEvents {
  std::vector<KvEvent> events;
  std::vector<BlockHash> hashes;
  std::vector<Token> tokens;

  bool empty() const { return events.empty(); }
  void clear() {
    events.clear();
    hashes.clear();
    tokens.clear();
  }
  void removed(BlockHash hash) {
    events.push_back({KvEvent::Kind::kRemoved, false, 0, hashes.size(), 1, 0});
    hashes.push_back(hash);
  }
  void cleared() { events.push_back({KvEvent::Kind::kCleared}); }
};

}  // namespace kvrouter::sim
