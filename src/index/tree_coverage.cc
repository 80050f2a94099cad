// Coverage: how much of each run each worker holds, and what becomes of it when blocks are lost.
#include <algorithm>
#include <cassert>

#include "index/tree.h"

namespace kvrouter {

std::atomic<std::uint64_t>* Tree::partial_entry(NodeId node, WorkerId worker) {
  if (nodes_.info(node).num_partial == 0) return nullptr;
  std::atomic<std::uint64_t>* partial = layout_.partial(nodes_.node(node));
  for (std::size_t i = 0; i < layout_.partials; ++i) {
    const std::uint64_t entry = partial[i].load(std::memory_order_relaxed);
    if (entry != 0 && Partial::worker(entry) == worker) return &partial[i];
  }
  return nullptr;
}

std::uint32_t Tree::coverage(NodeId node, WorkerId worker) {
  const Node* n = nodes_.node(node);
  if (n->full()[worker / 64].load(std::memory_order_relaxed) >> (worker % 64) & 1) return length(node);
  const std::atomic<std::uint64_t>* entry = partial_entry(node, worker);
  return entry ? Partial::depth(entry->load(std::memory_order_relaxed)) : 0;
}

std::uint32_t Tree::coverage_of_others(NodeId node, WorkerId worker) {
  const bool full = coverage(node, worker) == length(node);
  if (nodes_.info(node).num_full > (full ? 1u : 0u)) return length(node);
  std::uint32_t deepest = 0;
  const std::atomic<std::uint64_t>* partial = layout_.partial(nodes_.node(node));
  for (std::size_t i = 0; i < layout_.partials; ++i) {
    const std::uint64_t entry = partial[i].load(std::memory_order_relaxed);
    if (entry != 0 && Partial::worker(entry) != worker) deepest = std::max(deepest, Partial::depth(entry));
  }
  return deepest;
}

bool Tree::has_room_for_partial(NodeId node, WorkerId worker) {
  return nodes_.info(node).num_partial < layout_.partials || partial_entry(node, worker) != nullptr;
}

// REQUIRES: has_room_for_partial(), if the worker will hold a part of the run.
void Tree::set_coverage(NodeId node, WorkerId worker, std::uint32_t depth) {
  const std::uint32_t before = coverage(node, worker);
  if (depth == before) return;
  Node* n = nodes_.node(node);
  NodeInfo& info = nodes_.info(node);
  std::atomic<std::uint64_t>& word = n->full()[worker / 64];
  const std::uint64_t bit = std::uint64_t{1} << (worker % 64);
  std::atomic<std::uint64_t>* entry = partial_entry(node, worker);
  const std::uint32_t whole = length(node);

  // Of the two marks the new one is set before the old one is taken away.
  if (depth == whole) {
    word.store(word.load(std::memory_order_relaxed) | bit, std::memory_order_release);
    ++info.num_full;
  } else if (depth > 0) {
    if (!entry) {
      std::atomic<std::uint64_t>* free = layout_.partial(n);
      while (free->load(std::memory_order_relaxed) != 0) ++free;
      free->store(Partial::make(worker, depth), std::memory_order_release);
      ++info.num_partial;
    } else {
      entry->store(Partial::make(worker, depth), std::memory_order_release);
    }
  }
  if (before == whole) {
    word.store(word.load(std::memory_order_relaxed) & ~bit, std::memory_order_release);
    --info.num_full;
  }
  if (entry && (depth == whole || depth == 0)) {
    // A reader that has read the bits before and reads the entries after must read again.
    if (depth == whole) bump_version(node);
    entry->store(0, std::memory_order_release);
    --info.num_partial;
  }
  if (depth < before) bump_version(node);
  held_[worker].fetch_add(depth - std::size_t{before}, std::memory_order_relaxed);
}

// Plans changes_ if in each node the lost blocks are the last that the worker holds, named from the last on: what
// eviction in LRU order looks like.  False, and nothing planned, otherwise.
bool Tree::plan_tail_losses(WorkerId worker, std::span<const BlockId> blocks) {
  changes_.clear();
  for (const BlockId block : blocks) {
    const NodeId node = runs_.node(block);
    const std::uint32_t offset = block - nodes_.info(node).start;
    if (!changes_.empty() && changes_.back().node == node) {
      if (offset + 1 != changes_.back().coverage) return false;
      changes_.back().coverage = offset;
    } else {
      if (offset + 1 != coverage(node, worker)) return false;
      changes_.push_back({node, offset});
    }
  }
  return true;
}

// The general case: behind each stretch of lost blocks that is not at the end of what the worker holds, the node is
// split, so that every stretch is at the end of some node's.
void Tree::plan_losses(WorkerId worker, std::span<BlockId> blocks) {
  changes_.clear();
  std::sort(blocks.begin(), blocks.end());
  const auto duplicates = std::unique(blocks.begin(), blocks.end());
  blocks = blocks.first(static_cast<std::size_t>(duplicates - blocks.begin()));
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const NodeId node = runs_.node(blocks[i]);
    const BlockId start = nodes_.info(node).start;
    const bool stretch_goes_on =
        i + 1 < blocks.size() && blocks[i + 1] == blocks[i] + 1 && runs_.node(blocks[i + 1]) == node;
    if (!stretch_goes_on && blocks[i] - start + 1 < coverage(node, worker)) split(node, blocks[i] - start + 1);
  }
  for (const BlockId block : blocks) {
    const NodeId node = runs_.node(block);
    const std::uint32_t offset = block - nodes_.info(node).start;
    if (changes_.empty() || changes_.back().node != node) changes_.push_back({node, offset});
  }
}

void Tree::lose_blocks(WorkerId worker, std::span<BlockId> blocks) {
  if (blocks.empty()) return;
  if (!plan_tail_losses(worker, blocks)) plan_losses(worker, blocks);
  for (Change& change : changes_) {
    if (change.coverage > 0 && !has_room_for_partial(change.node, worker)) {
      const NodeId first = split(change.node, change.coverage);
      change = {runs_.node(nodes_.info(first).start + length(first)), 0};
    }
  }
  publish_losses(worker);
}

void Tree::publish_losses(WorkerId worker) {
  const auto shallower = [this](const Change& a, const Change& b) {
    return nodes_.info(a.node).depth < nodes_.info(b.node).depth;
  };
  if (changes_.size() > 1) std::sort(changes_.begin(), changes_.end(), shallower);
  for (const Change& change : changes_) set_coverage(change.node, worker, change.coverage);
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change) {
    if (in_tree(change->node)) tidy(change->node);
  }
}

void Tree::clear(WorkerId worker) {
  workers_[worker].clear();
  count_names(worker);
  if (held_blocks(worker) == 0) return;
  changes_.clear();
  for (NodeId node = NodePool::kFirst; node < nodes_.end(); ++node) {
    if (in_tree(node) && coverage(node, worker) > 0) changes_.push_back({node, 0});
  }
  publish_losses(worker);
}

}  // namespace kvrouter
