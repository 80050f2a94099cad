// The memory limit: what the tree takes, and which of it goes first.
//
// Leaves are given up, those that were longest neither found nor stored first; where that is equal, those that fewer
// workers hold.  A parent is found whenever its child is, so leaves alone need to be looked at, and prefixes go from
// their ends, as they do in the workers' own caches.  The oldest of all leaves is not looked for, but the oldest of a
// few drawn at random: that is close to it, costs the same however large the tree, and keeps no order that every find
// would have to change.
//
// The clock behind "long" ticks whenever a 64th of what fits has been stored, so that readers, who write the time into
// the nodes that they pass, do so rarely.
//
// For each worker that holds the leaf, giving it up is as if the worker had removed it; the workers' names for it are
// forgotten.
#include <array>

#include "index/fetch.h"
#include "index/tree.h"

namespace kvrouter {
namespace {

constexpr std::size_t kDrawn = 16;    // nodes that are drawn at once
constexpr std::size_t kRounds = 8;    // of drawing, before all are looked through
constexpr std::size_t kTicks = 64;    // of the clock, for as many blocks as fit
constexpr std::uint32_t kMost = 256;  // blocks of a leaf that go at once
// Of a block in the name table: ten to a cache line that is four fifths full.
constexpr double kNameBytes = 8;
// Of a node besides its own line: the edge to it, in a table at most 70% full beside the one it grew from, and a space.
constexpr std::size_t kNodeBytes = sizeof(NodeInfo) + 24 + sizeof(NodeId);

}  // namespace

std::size_t Tree::memory() const {
  const double blocks = static_cast<double>(runs_.used_blocks()) * (RunStore::kBytesPerBlock + kNameBytes);
  return static_cast<std::size_t>(blocks) + nodes_.num_allocated() * (layout_.bytes + kNodeBytes) + names_bytes_;
}

void Tree::count_names(WorkerId worker) {
  WorkerNames& names = workers_[worker];
  const std::size_t bytes = names.bytes();
  names_bytes_ += bytes - names.counted_bytes;
  names.counted_bytes = bytes;
}

void Tree::keep_limit(WorkerId worker) {
  count_names(worker);
  if (memory_limit_ == 0) return;
  constexpr double kBytes = RunStore::kBytesPerBlock + kNameBytes;
  if (static_cast<double>(stored_since_tick_) * kBytes * kTicks >= static_cast<double>(memory_limit_)) {
    stored_since_tick_ = 0;
    now_.store(now() + 1, std::memory_order_relaxed);
  }
  while (memory() > memory_limit_) {
    const NodeId leaf = least_valuable_leaf();
    if (leaf == 0) return;  // what is left are orphans
    give_up(leaf);
  }
}

NodeId Tree::least_valuable_leaf() {
  const NodeId size = nodes_.end() - NodePool::kFirst;
  if (size == 0) return 0;
  const auto is_leaf = [this](NodeId node) { return in_tree(node) && nodes_.info(node).num_children == 0; };
  NodeId best = 0;
  std::uint32_t best_age = 0, best_holders = 0;
  for (std::size_t round = 0; round < kRounds && best == 0; ++round) {
    std::array<NodeId, kDrawn> drawn;
    for (NodeId& node : drawn) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      node = NodePool::kFirst + static_cast<NodeId>((random_ >> 32) * size >> 32);
      fetch(nodes_.node(node));
      fetch(&nodes_.info(node));
    }
    for (const NodeId node : drawn) {
      if (!is_leaf(node)) continue;
      const std::uint32_t age = now() - nodes_.node(node)->used.load(std::memory_order_relaxed);
      const std::uint32_t holders = nodes_.info(node).num_full + nodes_.info(node).num_partial;
      if (best != 0 && (age < best_age || (age == best_age && holders >= best_holders))) continue;
      best = node, best_age = age, best_holders = holders;
    }
  }
  // Few leaves among many numbers that are not in use: the next one in turn.
  for (NodeId steps = 0; steps < size && best == 0; ++steps) {
    hand_ = (hand_ + 1) % size;
    if (is_leaf(NodePool::kFirst + hand_)) best = NodePool::kFirst + hand_;
  }
  return best;
}

void Tree::give_up(NodeId leaf) {
  if (length(leaf) > kMost) {
    const NodeId first = split(leaf, length(leaf) - kMost);
    leaf = runs_.node(nodes_.info(first).start + length(first));
  }
  const BlockId start = nodes_.info(leaf).start;
  for (WorkerId worker = 0; worker < num_workers_; ++worker) {
    const std::uint32_t held = coverage(leaf, worker);
    if (held == 0) continue;
    if (!workers_[worker].plain()) {
      workers_[worker].drop_blocks(start, start + held);
      count_names(worker);
    }
    set_coverage(leaf, worker, 0);
  }
  given_up_ += length(leaf);
  tidy(leaf);
}

}  // namespace kvrouter
