// The shape of the tree: splitting nodes, and taking out what nobody holds.
//
// Invariants: node n's children stand in the edge table under the space n.children, whose owner is n; the run of a node
// is the blocks [start, start + length) of the run store, each of which says that it belongs to the node.
#include <algorithm>
#include <cassert>

#include "index/tree.h"

namespace kvrouter {
namespace {

// Orphans, which no request is matched to, get a sixteenth of limited memory.
std::size_t max_orphans(std::size_t num_workers, std::size_t memory_limit) {
  constexpr std::size_t kMost = PrefixIndex::kMaxOrphansPerWorker;
  if (memory_limit == 0) return kMost;
  return std::min(kMost, memory_limit / 16 / num_workers / WorkerNames::kOrphanBytes);
}

}  // namespace

Tree::Tree(std::size_t num_workers, std::size_t memory_limit)
    : num_workers_(num_workers),
      layout_(num_workers),
      nodes_(layout_),
      workers_(num_workers),
      held_(std::make_unique<std::atomic<std::size_t>[]>(num_workers)),
      memory_limit_(memory_limit),
      max_orphans_(max_orphans(num_workers, memory_limit)) {
  if (memory_limit > 0) now_ = 1;
}

SpaceId Tree::allocate_space(NodeId owner) {
  if (!free_spaces_.empty()) {
    const SpaceId space = free_spaces_.back();
    free_spaces_.pop_back();
    space_owner_[space] = owner;
    return space;
  }
  space_owner_.push_back(owner);
  return static_cast<SpaceId>(space_owner_.size() - 1);
}

void Tree::bump_version(NodeId node) {
  std::atomic<std::uint32_t>& version = nodes_.node(node)->version;
  version.store(version.load(std::memory_order_relaxed) + 2, std::memory_order_release);
}

void Tree::enter_tree(NodeId node) {
  std::atomic<std::uint32_t>& version = nodes_.node(node)->version;
  version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

// Two new nodes take the place of one, which readers may still be walking: it stays as it was.
NodeId Tree::split(NodeId node, std::uint32_t at) {
  const NodeId first = nodes_.allocate();
  const NodeId second = nodes_.allocate();
  Node* old = nodes_.node(node);
  Node* a = nodes_.node(first);
  Node* b = nodes_.node(second);
  const NodeInfo whole = nodes_.info(node);
  const std::uint32_t whole_length = length(node);
  const std::atomic<LocalHash>* run = runs_.locals(whole.start);
  assert(at > 0 && at < whole_length);

  const SpaceId between = allocate_space(first);
  a->length.store(at, std::memory_order_relaxed);
  a->start.store(whole.start, std::memory_order_relaxed);
  a->parent.store(old->parent.load(std::memory_order_relaxed), std::memory_order_relaxed);
  a->children.store(between, std::memory_order_relaxed);
  nodes_.info(first) = {whole.start, at, 1, whole.depth, 0, 0};
  copy_coverage(node, 0, at, first);

  const SpaceId children = old->children.load(std::memory_order_relaxed);
  b->length.store(whole_length - at, std::memory_order_relaxed);
  b->start.store(whole.start + at, std::memory_order_relaxed);
  b->parent.store(between, std::memory_order_relaxed);
  b->children.store(children, std::memory_order_relaxed);
  nodes_.info(second) = {whole.start + at, whole.capacity - at, whole.num_children, whole.depth + at, 0, 0};
  copy_coverage(node, at, whole_length, second);
  for (Node* half : {a, b}) half->used.store(old->used.load(std::memory_order_relaxed), std::memory_order_relaxed);
  space_owner_[children] = second;

  std::fill_n(&runs_.node(whole.start), at, first);
  std::fill_n(&runs_.node(whole.start + at), whole_length - at, second);
  runs_.split(whole.start + at);

  enter_tree(second);
  edges_.put(between, run[at].load(std::memory_order_relaxed), {second, whole.start + at});
  enter_tree(first);
  edges_.put(a->parent.load(std::memory_order_relaxed), run[0].load(std::memory_order_relaxed), {first, whole.start});
  nodes_.retire(node);
  return first;
}

// `to` gets the coverage of blocks [begin, end) of `from`'s run.
void Tree::copy_coverage(NodeId from, std::uint32_t begin, std::uint32_t end, NodeId to) {
  const Node* source = nodes_.node(from);
  Node* target = nodes_.node(to);
  NodeInfo& info = nodes_.info(to);
  for (std::size_t i = 0; i < layout_.words; ++i) {
    target->full()[i].store(source->full()[i].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  info.num_full = nodes_.info(from).num_full;
  for (std::size_t i = 0; i < layout_.partials; ++i) {
    const std::uint64_t entry = layout_.partial(source)[i].load(std::memory_order_relaxed);
    if (entry == 0 || Partial::depth(entry) <= begin) continue;
    const std::uint32_t depth = std::min(Partial::depth(entry), end) - begin;
    const WorkerId worker = Partial::worker(entry);
    if (depth == end - begin) {
      std::atomic<std::uint64_t>& word = target->full()[worker / 64];
      word.store(word.load(std::memory_order_relaxed) | std::uint64_t{1} << (worker % 64), std::memory_order_relaxed);
      ++info.num_full;
    } else {
      layout_.partial(target)[info.num_partial++].store(Partial::make(worker, depth), std::memory_order_relaxed);
    }
  }
}

void Tree::tidy(NodeId node) {
  for (;;) {
    const NodeInfo& info = nodes_.info(node);
    if (info.num_children > 0 || info.num_full > 0) return;
    std::uint32_t deepest = 0;
    for (std::size_t i = 0; i < layout_.partials; ++i) {
      deepest =
          std::max(deepest, Partial::depth(layout_.partial(nodes_.node(node))[i].load(std::memory_order_relaxed)));
    }
    if (deepest > 0) return truncate(node, deepest);
    const SpaceId parent = nodes_.node(node)->parent.load(std::memory_order_relaxed);
    take_out(node);
    if (parent == kRootSpace) return;
    node = space_owner_[parent];
    --nodes_.info(node).num_children;
  }
}

// REQUIRES: nobody holds more than the first `new_length` blocks of the leaf.
void Tree::truncate(NodeId node, std::uint32_t new_length) {
  Node* n = nodes_.node(node);
  NodeInfo& info = nodes_.info(node);
  const std::uint32_t old_length = length(node);
  forget_names(info.start + new_length, info.start + old_length);
  num_blocks_ -= old_length - new_length;
  n->length.store(new_length, std::memory_order_release);
  for (std::size_t i = 0; i < layout_.partials; ++i) {  // who held all that is left now holds the whole run
    std::atomic<std::uint64_t>& entry = layout_.partial(n)[i];
    const std::uint64_t value = entry.load(std::memory_order_relaxed);
    if (value == 0 || Partial::depth(value) != new_length) continue;
    std::atomic<std::uint64_t>& word = n->full()[Partial::worker(value) / 64];
    word.store(word.load(std::memory_order_relaxed) | std::uint64_t{1} << (Partial::worker(value) % 64),
               std::memory_order_release);
    bump_version(node);
    entry.store(0, std::memory_order_release);
    ++info.num_full;
    --info.num_partial;
  }
  const BlockId end = RunStore::round_up(info.start + new_length);
  if (end < info.start + info.capacity) {
    runs_.release(end, info.start + info.capacity);
    info.capacity = end - info.start;
  }
}

// Takes a leaf that nobody holds out of the tree.
void Tree::take_out(NodeId node) {
  const Node* n = nodes_.node(node);
  const NodeInfo info = nodes_.info(node);
  edges_.erase(n->parent.load(std::memory_order_relaxed), runs_.locals(info.start)->load(std::memory_order_relaxed),
               node);
  nodes_.retire(node);
  forget_names(info.start, info.start + length(node));
  num_blocks_ -= length(node);
  runs_.release(info.start, info.start + info.capacity);
  free_spaces_.push_back(n->children.load(std::memory_order_relaxed));
}

}  // namespace kvrouter
