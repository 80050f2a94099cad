#include "server/token_cache.h"

#include <xxhash.h>

namespace kvrouter {

TokenCache::Key TokenCache::key_of(std::string_view text) {
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  return {hash.low64, hash.high64};
}

TokenIds TokenCache::find(std::string_view text) {
  const auto found = by_key_.find(key_of(text));
  if (found == by_key_.end()) {
    ++misses_;
    return nullptr;
  }
  ++hits_;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->ids;
}

void TokenCache::insert(std::string_view text, TokenIds ids) {
  const Key key = key_of(text);
  if (by_key_.count(key) || ids->size() > max_tokens_) return;
  tokens_ += ids->size();
  entries_.push_front({key, std::move(ids)});
  by_key_[key] = entries_.begin();
  while (tokens_ > max_tokens_ || entries_.size() > max_texts_) {
    tokens_ -= entries_.back().ids->size();
    by_key_.erase(entries_.back().key);
    entries_.pop_back();
  }
}

}  // namespace kvrouter
