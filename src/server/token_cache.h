// The token ids of texts seen lately, so that a prompt is tokenized once.  Texts are known by their 128-bit hash alone:
// none is kept.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvrouter/block_hash.h"

namespace kvrouter {

using TokenIds = std::shared_ptr<const std::vector<TokenId>>;

class TokenCache {
 public:
  // Holds up to `max_tokens` token ids, of up to `max_texts` texts: a text costs some 250 bytes however short it is.
  TokenCache(std::size_t max_tokens, std::size_t max_texts) : max_tokens_(max_tokens), max_texts_(max_texts) {}

  // Null if the text is not known.
  TokenIds find(std::string_view text);
  void insert(std::string_view text, TokenIds ids);

  std::size_t size() const { return tokens_; }
  std::uint64_t hits() const { return hits_; }
  std::uint64_t misses() const { return misses_; }

 private:
  struct Key {
    std::uint64_t low = 0, high = 0;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const { return static_cast<std::size_t>(key.low); }
  };
  struct Entry {
    Key key;
    TokenIds ids;
  };
  static Key key_of(std::string_view text);

  std::size_t max_tokens_, max_texts_;
  std::size_t tokens_ = 0;
  std::uint64_t hits_ = 0, misses_ = 0;
  std::list<Entry> entries_;  // the one used last first
  std::unordered_map<Key, std::list<Entry>::iterator, KeyHash> by_key_;
};

}  // namespace kvrouter
