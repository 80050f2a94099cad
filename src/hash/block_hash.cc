#include "kvrouter/block_hash.h"

#include <xxhash.h>

#include <bit>
#include <cassert>

namespace kvrouter {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as they lie in memory");

LocalHash hash_block(std::span<const TokenId> block, NamespaceHash ns) {
  return XXH3_64bits_withSeed(block.data(), block.size_bytes(), kBlockHashSeed + ns);
}

void hash_blocks(std::span<const TokenId> tokens, std::size_t block_size, NamespaceHash ns, std::span<LocalHash> out) {
  assert(block_size > 0 && out.size() == tokens.size() / block_size);
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = hash_block(tokens.subspan(i * block_size, block_size), ns);
  }
}

NamespaceHash lora_namespace(std::string_view lora_name) {
  return lora_name.empty() ? 0 : XXH3_64bits(lora_name.data(), lora_name.size());
}

void NamespaceBuilder::add_tagged(char tag, const void* data, std::size_t size) {
  buffer_.push_back(tag);
  const std::uint64_t length = size;
  buffer_.append(reinterpret_cast<const char*>(&length), sizeof length);
  buffer_.append(static_cast<const char*>(data), size);
}

void NamespaceBuilder::add_string(std::string_view value) {
  add_tagged('s', value.data(), value.size());
}
void NamespaceBuilder::add_bytes(std::string_view value) {
  add_tagged('b', value.data(), value.size());
}
void NamespaceBuilder::add_int(std::int64_t value) {
  add_tagged('i', &value, sizeof value);
}
void NamespaceBuilder::add_float(double value) {
  add_tagged('f', &value, sizeof value);
}
void NamespaceBuilder::add_null() {
  add_tagged('n', "", 0);
}

void NamespaceBuilder::begin_list(std::size_t count) {
  const std::uint64_t n = count;
  add_tagged('[', &n, sizeof n);
}

NamespaceHash NamespaceBuilder::finish() const {
  return buffer_.empty() ? base_ : XXH3_64bits_withSeed(buffer_.data(), buffer_.size(), base_);
}

}  // namespace kvrouter
