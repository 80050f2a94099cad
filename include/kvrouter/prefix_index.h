// The prefix index: which worker holds which prefix in its KV cache.
//
// A worker's overlap with a request is the number of *leading* blocks of the request that the worker holds.  The
// index answers exactly that, whatever the order of events: a child that is stored before its parent, or whose parent
// has been removed, is remembered, and counts again as soon as the blocks before it are held.
//
// Workers name their blocks by engine hashes of their own, which are looked up per worker and never compared across
// workers.  A worker that calls two different prefixes by one name contradicts itself: what it holds is forgotten, and
// the event that showed it is applied to the empty state.
//
// Threads: events are applied one at a time (a mutex among writers).  Look-ups take no lock and never wait, neither for
// writers nor for each other, and see each event as a whole or not at all.  Giving a prefix up is seen worker by
// worker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvrouter/block_hash.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {

using WorkerId = std::uint32_t;

struct PrefixIndexStats {
  std::size_t blocks = 0;              // distinct blocks in the tree
  std::size_t pairs = 0;               // (worker, block) pairs
  std::size_t orphans = 0;             // blocks whose place is not known yet, because their parent is not
  std::uint64_t orphans_dropped = 0;   // over the limit of orphans a worker may have
  std::uint64_t unknown_removals = 0;  // removals of blocks that the worker was not known to hold
  std::uint64_t contradictions = 0;    // events in which a worker called two prefixes by one name
  std::size_t memory_bytes = 0;        // in use, by its own account
  std::uint64_t given_up_blocks = 0;   // distinct blocks, to stay below the memory limit
};

class PrefixIndex {
 public:
  // A worker's blocks of unknown place beyond this many are dropped and counted.
  static constexpr std::size_t kMaxOrphansPerWorker = 1 << 16;

  // Workers are numbered 0 to num_workers - 1.
  // memory_limit: bytes; 0: none.  Where a store takes the index beyond it, the prefixes that were longest neither
  // found nor stored are given up, from their ends.  A worker that stores behind a block that was given up stores
  // orphans, which count once it has stored that block again; its removals of such blocks are unknown removals.
  // REQUIRES: num_workers > 0.
  explicit PrefixIndex(std::size_t num_workers, std::size_t memory_limit = 0);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  std::size_t num_workers() const;

  // `worker` now holds a chain of blocks, the first of which follows the block that it calls `parent` (nothing: the
  // chain starts a sequence).  Storing a block that is held already changes nothing.
  // REQUIRES (this and below): worker < num_workers().
  void store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks);
  // `worker` no longer holds these blocks.  Their descendants stay held, and count again once these are stored again.
  void remove(WorkerId worker, std::span<const EngineHash> blocks);
  // `worker` holds nothing any more.
  void clear(WorkerId worker);

  // For each worker, the number of leading blocks of `blocks` that it holds.
  // REQUIRES: overlap.size() == num_workers().
  void find_matches(std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) const;

  // Number of blocks that `worker` holds.
  std::size_t held_blocks(WorkerId worker) const;
  PrefixIndexStats stats() const;
  // The names by which `worker` holds its blocks, in ascending order, those of unknown place (orphans) included.  To
  // compare what two indexes know: it holds up writers and looks at the whole index.
  std::vector<EngineHash> worker_blocks(WorkerId worker) const;
  // All that `worker` holds and the order in which to store it: an empty index that is told these stores by a worker
  // knows the same of it.  (But for blocks behind one that the worker has lost and that nobody else calls by a name.)
  std::vector<StoredChain> worker_chains(WorkerId worker) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
