// Block hashes: the router's name for the content of one KV-cache block.
//
// A block hash is XXH3-64 over the little-endian 32-bit token ids of one full block, with seed 1337.  It depends on
// the block's own tokens only, not on what precedes it ("local hash"); the prefix index chains them.  A partial last
// block has no hash.  The values equal those of `compute_block_hash_for_seq` in NVIDIA Dynamo's runtime, so hashes
// made by either side can be sent to either router.
//
// What else decides whether two blocks of equal tokens may be shared (LoRA adapter, multimodal items, cache salt) goes
// in as a namespace: a 64-bit value that is added to the seed.  Namespace 0 is "nothing else".
//
// All functions are pure and safe to call from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kvrouter {

using TokenId = std::uint32_t;
using LocalHash = std::uint64_t;
using NamespaceHash = std::uint64_t;

inline constexpr std::uint64_t kBlockHashSeed = 1337;

// Hash of one full block.
LocalHash hash_block(std::span<const TokenId> block, NamespaceHash ns = 0);

// Hashes of every full block of `tokens`, in order.
// REQUIRES: block_size > 0; out.size() == tokens.size() / block_size.
void hash_blocks(std::span<const TokenId> tokens, std::size_t block_size, NamespaceHash ns, std::span<LocalHash> out);

// The namespace of a LoRA adapter: XXH3-64 of its name.  An empty name is namespace 0.
NamespaceHash lora_namespace(std::string_view lora_name);

// Folds extra keys (cache salt, multimodal items, ...) of one block into a namespace.  Values are added in order and
// with their type and length, so that no two different sequences of keys look alike.
class NamespaceBuilder {
 public:
  explicit NamespaceBuilder(NamespaceHash base) : base_(base) {}
  void add_string(std::string_view value);
  void add_bytes(std::string_view value);
  void add_int(std::int64_t value);
  void add_float(double value);
  void add_null();
  // Opens a nested list of `count` values, which follow.
  void begin_list(std::size_t count);
  // The namespace; the base itself if nothing was added.
  NamespaceHash finish() const;

 private:
  void add_tagged(char tag, const void* data, std::size_t size);

  NamespaceHash base_;
  std::string buffer_;
};

}  // namespace kvrouter
