// Prefixes on their way: which prefixes were sent to which worker a short while ago.
//
// A request that has been routed will be in its worker's cache soon, but no KV event says so yet.  Here it counts at
// once.  An entry lasts for one to two generations and needs no removal: what the worker confirms by events is in the
// index by then, and what never comes is forgotten.
//
// Within a generation the set is closed: a worker that was sent a prefix was sent all shorter ones.  So the workers at
// depth k are a superset of those at depth k + 1, and a look-up halves intervals instead of probing every depth.
//
// Of long prompts only some depths are kept (every block up to kEveryBlock, then every kStride-th), so that the cost of
// a long prompt stays small; a depth is reported rounded down to one of these.
//
// Not safe for threads.  Allocates only to grow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvrouter/policy.h"

namespace kvrouter {

class RoutedPrefixes {
 public:
  static constexpr std::size_t kEveryBlock = 32;
  static constexpr std::size_t kStride = 8;
  // Slots of a generation, half of which are used.  One that is full ends early, and is counted.
  static constexpr std::size_t kMaxSlots = 1 << 20;

  explicit RoutedPrefixes(std::size_t num_workers = 1) { reset(num_workers); }

  // Forgets everything; workers are numbered 0 to num_workers - 1 from now on.
  void reset(std::size_t num_workers);
  // Forgets what was added before the last call.
  void next_generation();

  // A request with these prefixes (see RoutingRequest::prefixes) was sent to `worker`.
  void add(std::span<const PrefixHash> prefixes, WorkerId worker);
  // The same, given only those of its prefixes that are kept.
  void add_kept(std::span<const PrefixHash> kept, WorkerId worker);
  // Appends those of a request's prefixes that are kept: the first `most` of them.
  static std::size_t append_kept(std::span<const PrefixHash> prefixes, std::size_t most, std::vector<PrefixHash>& out);
  // depth[w] becomes the number of leading prefixes that were sent to worker w, where that is more.
  void raise(std::span<const PrefixHash> prefixes, std::span<std::uint32_t> depth);

  std::uint64_t ended_early() const { return ended_early_; }

 private:
  // An open-addressing table from prefix to a set of workers.  Slots of another epoch are empty.
  struct Generation {
    struct Slot {
      PrefixHash key;
      std::uint64_t epoch;
    };
    std::vector<Slot> slots;
    std::vector<std::uint64_t> sets;  // words_ words a slot
    std::size_t size = 0;
    std::uint64_t epoch = 1;
  };

  // Depths that are kept: the number of those up to `depth`, and the one with this index (from 0).
  static std::size_t num_kept(std::size_t depth) {
    return depth <= kEveryBlock ? depth : kEveryBlock + (depth - kEveryBlock) / kStride;
  }
  static std::size_t kept_depth(std::size_t index) {
    return index < kEveryBlock ? index + 1 : kEveryBlock + (index + 1 - kEveryBlock) * kStride;
  }

  // kept(i): the i-th kept prefix of `count`.
  template <typename Kept>
  void add_all(std::size_t count, Kept kept, WorkerId worker);
  std::size_t slot_of(const Generation& generation, PrefixHash key) const;  // its slot, or the empty one for it
  void grow(Generation& generation);
  bool contains(const Generation& generation, PrefixHash key, WorkerId worker) const;
  // The workers that were sent `key`, in either generation, into row `row` of the scratch.
  void read(PrefixHash key, std::size_t row);
  // The workers of row `low_row` that are missing from row `high_row` drop out between these kept depths.
  void bisect(std::span<const PrefixHash> prefixes, std::size_t low, std::size_t low_row, std::size_t high,
              std::size_t high_row, std::span<std::uint32_t> depth);
  std::uint64_t* row(std::size_t index) { return scratch_.data() + index * words_; }

  std::size_t words_ = 1;
  Generation current_, previous_;
  std::vector<std::uint64_t> scratch_;
  std::uint64_t ended_early_ = 0;
};

}  // namespace kvrouter
