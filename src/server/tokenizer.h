// Token ids for prompts that come as text: from a worker's own POST /tokenize, so that they are the worker's to the
// last special token, and from a cache of what was asked lately.  Used by the service's thread alone.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "server/fleet.h"
#include "server/token_cache.h"

namespace kvrouter {

class Tokenizer {
 public:
  static constexpr std::size_t kCachedTokens = 16 * 1024 * 1024;  // 64 MiB

  static constexpr std::size_t kCachedTexts = 256 * 1024;  // as much again at most

  explicit Tokenizer(Fleet& fleet) : fleet_(fleet), cache_(kCachedTokens, kCachedTexts) {}

  // `done` gets the ids, at once where they are cached; null where no worker can tell them.  `body` is that of the
  // request to /tokenize.  Returns the call under way, if there is one, to be cancelled when nobody wants it any more.
  std::shared_ptr<UpstreamCall> tokenize(const std::string& model, const std::string& body,
                                         std::function<void(TokenIds)> done);

  const TokenCache& cache() const { return cache_; }
  std::uint64_t failures() const { return failures_; }

 private:
  Fleet& fleet_;
  TokenCache cache_;
  std::uint64_t failures_ = 0;
};

}  // namespace kvrouter
