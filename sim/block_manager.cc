#include "sim/block_manager.h"

#include <xxhash.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kvrouter::sim {
namespace {

const BlockManagerOptions& checked(const BlockManagerOptions& options) {
  if (options.block_size < 1) {
    throw std::invalid_argument("block_size is " + std::to_string(options.block_size) + ", must be at least 1");
  }
  if (options.num_blocks < 2) {
    throw std::invalid_argument("num_blocks is " + std::to_string(options.num_blocks) +
                                ", must be at least 2 (block 0 is never used)");
  }
  return options;
}

}  // namespace

BlockManager::BlockManager(const BlockManagerOptions& options)
    : options_(checked(options)), pool_(options.num_blocks, options.kv_events ? &events_ : nullptr) {}

void BlockManager::hash_full_blocks(Sequence& sequence) const {
  if (!options_.prefix_caching) return;
  const auto block_size = static_cast<std::size_t>(options_.block_size);
  const std::size_t num_full = sequence.tokens.size() / block_size;
  while (sequence.hashes.size() < num_full) {
    const std::size_t index = sequence.hashes.size();
    const std::uint64_t parent =
        index > 0 ? sequence.hashes[index - 1] : XXH3_64bits_withSeed("kvrouter-sim", 12, options_.hash_seed);
    sequence.hashes.push_back(
        XXH3_64bits_withSeed(&sequence.tokens[index * block_size], block_size * sizeof(Token), parent));
  }
}

std::int32_t BlockManager::find_cached_blocks(const Sequence& sequence) const {
  if (!options_.prefix_caching || sequence.tokens.empty()) return 0;
  // The last token is always computed: its logits are what the next one is drawn from.
  const auto limit = static_cast<std::int32_t>((sequence.tokens.size() - 1) / options_.block_size);
  std::int32_t found = 0;
  while (found < limit && pool_.find(sequence.hashes[found]) >= 0) ++found;
  return found;
}

bool BlockManager::allocate(Sequence& sequence, std::int32_t num_tokens, std::int32_t hit_blocks, bool whole_must_fit) {
  hits_.clear();
  std::int32_t free_hits = 0;  // cached blocks that nobody uses count as free until they are touched
  for (std::int32_t i = 0; i < hit_blocks; ++i) {
    hits_.push_back(pool_.find(sequence.hashes[i]));
    free_hits += pool_.is_free(hits_.back()) ? 1 : 0;
  }
  const std::int32_t held = static_cast<std::int32_t>(sequence.blocks.size()) + hit_blocks;
  const auto fits = [&](std::int32_t tokens) {
    return std::max(blocks_for(tokens) - held, 0) + free_hits <= pool_.num_free();
  };
  if (whole_must_fit && !fits(static_cast<std::int32_t>(sequence.tokens.size()))) return false;
  if (!fits(num_tokens)) return false;

  if (hit_blocks > 0) {
    pool_.touch(hits_);
    sequence.blocks.assign(hits_.begin(), hits_.end());
    sequence.num_cached_blocks = hit_blocks;
  }
  pool_.take(std::max(blocks_for(num_tokens) - held, 0), sequence.blocks);
  cache_full_blocks(sequence, num_tokens);
  return true;
}

void BlockManager::cache_full_blocks(Sequence& sequence, std::int32_t num_tokens) {
  if (!options_.prefix_caching) return;
  const std::int32_t first = sequence.num_cached_blocks;
  const std::int32_t last = num_tokens / options_.block_size;
  if (first >= last) return;
  for (std::int32_t i = first; i < last; ++i) pool_.cache(sequence.blocks[i], sequence.hashes[i]);
  sequence.num_cached_blocks = last;
  if (!options_.kv_events) return;

  KvEvent event{KvEvent::Kind::kStored};
  event.has_parent = first > 0;
  event.parent = first > 0 ? sequence.hashes[first - 1] : 0;
  event.first_hash = events_.hashes.size();
  event.num_hashes = static_cast<std::size_t>(last - first);
  event.first_token = events_.tokens.size();
  events_.events.push_back(event);
  events_.hashes.insert(events_.hashes.end(), sequence.hashes.begin() + first, sequence.hashes.begin() + last);
  events_.tokens.insert(events_.tokens.end(), sequence.tokens.begin() + first * options_.block_size,
                        sequence.tokens.begin() + last * options_.block_size);
}

void BlockManager::free(Sequence& sequence) {
  pool_.release_reversed(sequence.blocks);
  sequence.blocks.clear();
  sequence.num_cached_blocks = 0;
}

}  // namespace kvrouter::sim
