#include "kvrouter/prefix_index.h"

#include <cassert>
#include <mutex>

#include "index/tree.h"
#include "index/tree_reader.h"

namespace kvrouter {

class PrefixIndex::Impl {
 public:
  Impl(std::size_t num_workers, std::size_t memory_limit) : tree(num_workers, memory_limit) {}

  std::mutex writers;
  Tree tree;
};

PrefixIndex::PrefixIndex(std::size_t num_workers, std::size_t memory_limit)
    : impl_(std::make_unique<Impl>(num_workers, memory_limit)) {
  assert(num_workers > 0);
}
PrefixIndex::~PrefixIndex() = default;

std::size_t PrefixIndex::num_workers() const {
  return impl_->tree.num_workers();
}

void PrefixIndex::store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
  const std::lock_guard lock(impl_->writers);
  impl_->tree.store(worker, parent, blocks);
}

void PrefixIndex::remove(WorkerId worker, std::span<const EngineHash> blocks) {
  const std::lock_guard lock(impl_->writers);
  impl_->tree.remove(worker, blocks);
}

void PrefixIndex::clear(WorkerId worker) {
  const std::lock_guard lock(impl_->writers);
  impl_->tree.clear(worker);
}

void PrefixIndex::find_matches(std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) const {
  assert(overlap.size() == num_workers());
  kvrouter::find_matches(impl_->tree, blocks, overlap);
}

std::size_t PrefixIndex::held_blocks(WorkerId worker) const {
  return impl_->tree.held_blocks(worker);
}

std::vector<EngineHash> PrefixIndex::worker_blocks(WorkerId worker) const {
  const std::lock_guard lock(impl_->writers);
  return impl_->tree.worker_blocks(worker);
}

std::vector<StoredChain> PrefixIndex::worker_chains(WorkerId worker) const {
  const std::lock_guard lock(impl_->writers);
  return impl_->tree.worker_chains(worker);
}

PrefixIndexStats PrefixIndex::stats() const {
  const std::lock_guard lock(impl_->writers);
  PrefixIndexStats stats;
  impl_->tree.add_to(stats);
  return stats;
}

}  // namespace kvrouter
