// Blocks for sequences: the prefix cache as one request after the other sees it.  Follows vLLM V1's KV cache manager
// for a model with full attention:
//  - A block is named by its tokens and all before them (chained hash).  Full blocks are cached when their tokens are
//    scheduled, output tokens included.
//  - A request hits its leading cached blocks, but never its last token: a prompt that is cached whole gets its last
//    block computed, stored and told again.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/block_pool.h"
#include "sim/kv_events.h"

namespace kvrouter::sim {

struct BlockManagerOptions {
  std::int32_t num_blocks = 448;
  std::int32_t block_size = 64;  // tokens a block
  bool prefix_caching = true;
  bool kv_events = true;
  std::uint64_t hash_seed = 0;  // the same tokens get other names under another seed
};

// The tokens of a request, and the blocks that hold them.
struct Sequence {
  std::vector<Token> tokens;      // the prompt, then what was generated
  std::vector<BlockHash> hashes;  // of the full blocks of `tokens`, as far as hash_full_blocks() came
  std::vector<BlockId> blocks;
  std::int32_t num_cached_blocks = 0;  // leading blocks that are in the prefix cache under this sequence's hashes
};

class BlockManager {
 public:
  // Throws std::invalid_argument for options that make no cache.
  explicit BlockManager(const BlockManagerOptions& options);

  const BlockManagerOptions& options() const { return options_; }
  const BlockPool& pool() const { return pool_; }
  // What happened since clear(); the caller clears.
  KvEvents& events() { return events_; }

  // Brings sequence.hashes up to date with its tokens.
  void hash_full_blocks(Sequence& sequence) const;
  // Number of leading blocks of the sequence that could be reused now.  REQUIRES: hashes up to date.
  std::int32_t find_cached_blocks(const Sequence& sequence) const;

  // Makes room for tokens [0, num_tokens) of the sequence and caches those of its blocks that this fills.  hit_blocks:
  // leading blocks to reuse, only for a sequence without blocks; whole_must_fit: refuse unless all of the sequence's
  // tokens would fit now.  False, and nothing done, when there are too few free blocks.
  bool allocate(Sequence& sequence, std::int32_t num_tokens, std::int32_t hit_blocks, bool whole_must_fit);
  // Gives the sequence's blocks back; their content stays cached until they are needed.
  void free(Sequence& sequence);
  // Forgets all cached prefixes; false while a sequence holds blocks.
  bool reset() { return pool_.reset(); }

 private:
  std::int32_t blocks_for(std::int32_t num_tokens) const {
    return (num_tokens + options_.block_size - 1) / options_.block_size;
  }
  void cache_full_blocks(Sequence& sequence, std::int32_t num_tokens);

  BlockManagerOptions options_;
  KvEvents events_;
  BlockPool pool_;
  std::vector<BlockId> hits_;  // scratch
};

}  // namespace kvrouter::sim
