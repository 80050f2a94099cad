// The KV-cache blocks of one worker: which are free, in what order they are reused, and which of them hold a cached
// prefix.  Follows vLLM V1's block pool:
//  - The free queue is in order of id at first.  Blocks are taken from its front; a block that still holds a cached
//    prefix loses it (is evicted) only then.
//  - Freed blocks with a cached prefix go to the back, those without to the front.
//  - Several blocks may hold the same prefix; the one cached first is the one that is found.
//  - Block 0 is the null block: never free, never used.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sim/kv_events.h"

namespace kvrouter::sim {

using BlockId = std::int32_t;

class BlockPool {
 public:
  // num_blocks >= 2, the null block among them.  events: where evictions are told, or null.
  BlockPool(std::int32_t num_blocks, KvEvents* events);

  std::int32_t num_blocks() const { return num_blocks_; }
  std::int32_t num_free() const { return num_free_; }
  // Share of the blocks in use, 0 to 1; the null block does not count.
  double usage() const { return 1.0 - static_cast<double>(num_free_) / (num_blocks_ - 1); }

  // The block that holds this prefix, or -1.
  BlockId find(BlockHash hash) const;
  // What the cache holds: prefixes that a request would find, each once, in no order.
  struct Held {
    std::vector<BlockHash> told;
    // Those that BlockRemoved has been said of since the last BlockStored, because one of several blocks that held the
    // prefix was evicted: vLLM says so too, and nobody outside can know better.
    std::vector<BlockHash> told_removed;
  };
  Held held() const;

  bool is_free(BlockId id) const { return blocks_[id].references == 0; }

  // Takes `count` blocks from the front of the free queue and appends them to `out`.  REQUIRES: count <= num_free().
  void take(std::int32_t count, std::vector<BlockId>& out);
  // One more user of each block.
  void touch(std::span<const BlockId> ids);
  // One user less of each block, last block first (so that the ends of prefixes are evicted before their beginnings).
  void release_reversed(std::span<const BlockId> ids);
  // From now on the block is found under `hash`.  REQUIRES: the block is used and holds no prefix.
  void cache(BlockId id, BlockHash hash);

  // Forgets all prefixes and says so; false, and nothing done, while a block is in use.
  bool reset();

 private:
  struct Block {
    BlockHash hash = 0;
    std::int32_t references = 0;
    BlockId previous = -1, next = -1;            // in the free queue
    BlockId previous_same = -1, next_same = -1;  // blocks of the same prefix, in the order of caching
    bool cached = false;
  };
  struct Slot {
    BlockHash hash = 0;
    BlockId first = -1, last = -1;  // first < 0: an empty slot
    bool told_removed = false;
  };

  std::size_t slot_of(BlockHash hash) const;
  void erase_slot(std::size_t slot);
  void evict(Block& block);
  void unlink(BlockId id);
  void link_after(BlockId position, BlockId id);

  std::int32_t num_blocks_;
  std::int32_t num_free_;
  BlockId queue_;  // index of the queue's sentinel, one past the last block
  std::vector<Block> blocks_;
  std::vector<Slot> slots_;  // open addressing; never more than half full
  std::size_t mask_;
  KvEvents* events_;
};

}  // namespace kvrouter::sim
