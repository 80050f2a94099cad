// Invariants:
// - A prefix is a 64-bit chain: chain(chain(root, local 1), local 2)...  Two prefixes of equal chain are taken for the
//   same; with a million blocks the chance that any two collide is below 1e-7.
// - held_ has an entry for exactly the chains that some worker holds, with one bit a worker.  Nothing points from a
//   block to its parent or children, so removing the middle of a prefix needs no repair: descendants are out of reach
//   of find_matches(), which walks from the front, and within it again when the middle returns.
// - workers_[w].chain_of has an entry for exactly the engine hashes that w holds and whose place is known; the bit of
//   w at that chain is set.  If w calls one chain by several names, aliases counts the names beyond the first.
#include "kvrouter/prefix_index.h"

#include <xxhash.h>

#include <bit>
#include <cassert>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "index/flat_map.h"
#include "index/orphans.h"

namespace kvrouter {
namespace {

using Chain = std::uint64_t;
constexpr Chain kRoot = 0;

Chain extend(Chain prefix, LocalHash local) {
  const std::uint64_t pair[2] = {prefix, local};
  return XXH3_64bits(pair, sizeof pair);
}

// The sets of workers that hold each chain: bit sets in one array, handed out by number.
class HolderSets {
 public:
  explicit HolderSets(std::size_t num_workers) : words_((num_workers + 63) / 64) {}

  std::uint32_t allocate() {
    if (!free_.empty()) {
      const std::uint32_t id = free_.back();
      free_.pop_back();
      return id;
    }
    bits_.resize(bits_.size() + words_);
    return static_cast<std::uint32_t>(bits_.size() / words_ - 1);
  }
  // REQUIRES: the set is empty.
  void release(std::uint32_t id) { free_.push_back(id); }

  bool set(std::uint32_t id, WorkerId worker) {
    std::uint64_t& word = at(id)[worker / 64];
    const std::uint64_t bit = std::uint64_t{1} << (worker % 64);
    const bool fresh = !(word & bit);
    word |= bit;
    return fresh;
  }
  // True if the set is empty afterwards.
  bool reset(std::uint32_t id, WorkerId worker) {
    std::uint64_t* words = at(id);
    words[worker / 64] &= ~(std::uint64_t{1} << (worker % 64));
    std::uint64_t any = 0;
    for (std::size_t i = 0; i < words_; ++i) any |= words[i];
    return any == 0;
  }
  std::uint64_t* at(std::uint32_t id) { return bits_.data() + std::size_t{id} * words_; }
  const std::uint64_t* at(std::uint32_t id) const { return bits_.data() + std::size_t{id} * words_; }
  std::size_t words() const { return words_; }

 private:
  std::size_t words_;
  std::vector<std::uint64_t> bits_;
  std::vector<std::uint32_t> free_;
};

}  // namespace

class PrefixIndex::Impl {
 public:
  explicit Impl(std::size_t num_workers) : holders_(num_workers), workers_(num_workers) {}

  std::size_t num_workers() const { return workers_.size(); }

  void store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
    const std::unique_lock lock(mutex_);
    Worker& w = workers_[worker];
    // Where the next block goes: under `chain` if that is known, else under the engine's name `parent`.
    std::optional<Chain> chain = kRoot;
    if (parent) chain = known_chain(w, *parent);
    for (const StoredBlock& block : blocks) {
      if (chain) {
        chain = extend(*chain, block.local);
        place(worker, block.engine, *chain);
      } else {
        chain = known_chain(w, block.engine);  // held already: its place is known though its parent's is not
        if (!chain) add_orphan(w, *parent, block);
      }
      parent = block.engine;
    }
  }

  void remove(WorkerId worker, std::span<const EngineHash> blocks) {
    const std::unique_lock lock(mutex_);
    Worker& w = workers_[worker];
    for (const EngineHash engine : blocks) {
      if (const Chain* chain = w.chain_of.find(engine)) {
        release(worker, *chain);
        w.chain_of.erase(engine);
      } else if (!w.orphans.remove(engine)) {
        ++unknown_removals_;
      }
    }
  }

  void clear(WorkerId worker) {
    const std::unique_lock lock(mutex_);
    Worker& w = workers_[worker];
    w.aliases.clear();
    w.chain_of.for_each([&](EngineHash, Chain chain) { release(worker, chain); });
    w.chain_of.clear();
    w.orphans.clear();
  }

  void find_matches(std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) const {
    std::fill(overlap.begin(), overlap.end(), 0);
    thread_local std::vector<std::uint64_t> alive;
    alive.assign(holders_.words(), ~std::uint64_t{0});
    const std::shared_lock lock(mutex_);
    Chain chain = kRoot;
    std::uint32_t depth = 0;
    for (const LocalHash local : blocks) {
      chain = extend(chain, local);
      const std::uint32_t* id = held_.find(chain);
      if (!id) break;
      const std::uint64_t* holders = holders_.at(*id);
      std::uint64_t any = 0;
      for (std::size_t i = 0; i < alive.size(); ++i) {
        const std::uint64_t gone = alive[i] & ~holders[i];
        if (depth > 0) record(gone, i, depth, overlap);
        alive[i] &= holders[i];
        any |= alive[i];
      }
      if (!any) return;
      ++depth;
    }
    if (depth == 0) return;
    for (std::size_t i = 0; i < alive.size(); ++i) record(alive[i], i, depth, overlap);
  }

  std::size_t held_blocks(WorkerId worker) const {
    const std::shared_lock lock(mutex_);
    return workers_[worker].chain_of.size();
  }

  PrefixIndexStats stats() const {
    const std::shared_lock lock(mutex_);
    PrefixIndexStats stats;
    stats.blocks = held_.size();
    for (const Worker& w : workers_) {
      stats.pairs += w.chain_of.size();
      stats.orphans += w.orphans.size();
    }
    stats.orphans_dropped = orphans_dropped_;
    stats.unknown_removals = unknown_removals_;
    return stats;
  }

 private:
  struct Worker {
    FlatMap<Chain> chain_of;  // by engine hash
    std::unordered_map<Chain, std::size_t> aliases;
    Orphans orphans;
  };

  static void record(std::uint64_t workers, std::size_t word, std::uint32_t depth, std::span<std::uint32_t> overlap) {
    for (; workers; workers &= workers - 1) {
      overlap[word * 64 + static_cast<std::size_t>(std::countr_zero(workers))] = depth;
    }
  }

  static std::optional<Chain> known_chain(const Worker& w, EngineHash engine) {
    const Chain* chain = w.chain_of.find(engine);
    return chain ? std::optional(*chain) : std::nullopt;
  }

  void add_orphan(Worker& w, EngineHash parent, StoredBlock block) {
    if (w.orphans.size() >= kMaxOrphansPerWorker) {
      ++orphans_dropped_;
    } else {
      w.orphans.add(parent, block);
    }
  }

  // `engine` names the block at `chain`; then so do the orphans that waited for it, and theirs.
  void place(WorkerId worker, EngineHash engine, Chain chain) {
    place_one(worker, engine, chain);
    Worker& w = workers_[worker];
    if (w.orphans.empty()) return;
    std::vector<std::pair<EngineHash, Chain>> placed = {{engine, chain}};
    while (!placed.empty()) {
      const auto [parent, parent_chain] = placed.back();
      placed.pop_back();
      for (const StoredBlock& child : w.orphans.take_children(parent)) {
        const Chain child_chain = extend(parent_chain, child.local);
        place_one(worker, child.engine, child_chain);
        placed.emplace_back(child.engine, child_chain);
      }
    }
  }

  void place_one(WorkerId worker, EngineHash engine, Chain chain) {
    Worker& w = workers_[worker];
    const auto [known, fresh] = w.chain_of.insert(engine, chain);
    if (!fresh) {
      if (*known == chain) return;
      release(worker, *known);  // the engine contradicts itself: its last word counts
      *known = chain;
    } else if (!w.orphans.empty()) {
      w.orphans.remove(engine);
    }
    const auto [id, new_chain] = held_.insert(chain, 0);
    if (new_chain) *id = holders_.allocate();
    if (!holders_.set(*id, worker)) ++w.aliases[chain];
  }

  // One name of `worker` for `chain` is gone.
  void release(WorkerId worker, Chain chain) {
    Worker& w = workers_[worker];
    if (!w.aliases.empty()) {
      const auto alias = w.aliases.find(chain);
      if (alias != w.aliases.end()) {
        if (--alias->second == 0) w.aliases.erase(alias);
        return;
      }
    }
    const std::uint32_t* id = held_.find(chain);
    if (id && holders_.reset(*id, worker)) {
      holders_.release(*id);
      held_.erase(chain);
    }
  }

  mutable std::shared_mutex mutex_;
  FlatMap<std::uint32_t> held_;  // chain -> number of its set in holders_
  HolderSets holders_;
  std::vector<Worker> workers_;
  std::uint64_t orphans_dropped_ = 0;
  std::uint64_t unknown_removals_ = 0;
};

PrefixIndex::PrefixIndex(std::size_t num_workers) : impl_(std::make_unique<Impl>(num_workers)) {
  assert(num_workers > 0);
}
PrefixIndex::~PrefixIndex() = default;

std::size_t PrefixIndex::num_workers() const {
  return impl_->num_workers();
}
void PrefixIndex::store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
  impl_->store(worker, parent, blocks);
}
void PrefixIndex::remove(WorkerId worker, std::span<const EngineHash> blocks) {
  impl_->remove(worker, blocks);
}
void PrefixIndex::clear(WorkerId worker) {
  impl_->clear(worker);
}
void PrefixIndex::find_matches(std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) const {
  assert(overlap.size() == num_workers());
  impl_->find_matches(blocks, overlap);
}
std::size_t PrefixIndex::held_blocks(WorkerId worker) const {
  return impl_->held_blocks(worker);
}
PrefixIndexStats PrefixIndex::stats() const {
  return impl_->stats();
}

}  // namespace kvrouter
