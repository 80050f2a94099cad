// Storing a chain: walk along what stands in the tree already, then append the rest.  Nothing that the walk finds out
// is seen by readers before the whole chain is in place: then it is published from its deepest node up (node.h).
#include <algorithm>
#include <cassert>

#include "index/tree.h"

namespace kvrouter {
namespace {

// A short stretch of blocks is what a worker has just generated; it gets room to go on in one node.
constexpr std::uint32_t kGrowingRoom = 16;
constexpr std::size_t kGrowingStep = 8;

}  // namespace

void Tree::store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    contradicted_ = false;
    try_store(worker, parent, blocks);
    if (!contradicted_) break;
    ++contradictions_;
    clear(worker);  // a chain that contradicts itself on its own is left out in the end
  }
  stored_since_tick_ += blocks.size();
  keep_limit(worker);
}

void Tree::try_store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
  WorkerNames& names = workers_[worker];
  std::optional<Cursor> at = Cursor{};
  if (parent) {
    const std::optional<BlockId> block = find_held(worker, *parent);
    at = block ? std::optional(cursor_behind(*block)) : std::nullopt;
  }
  std::size_t unplaced = 0;  // leading blocks whose place is not known
  for (; !at && unplaced < blocks.size(); ++unplaced) {
    const StoredBlock& block = blocks[unplaced];
    if (const std::optional<BlockId> held = find_held(worker, block.engine)) {
      at = cursor_behind(*held);  // its place is known though its parent's is not
    } else {
      add_orphan(names, *parent, block);
    }
    parent = block.engine;
  }
  blocks = blocks.subspan(unplaced);
  if (blocks.empty()) return;
  hidden_ = !names.orphans.empty();
  placed_.clear();
  store_chain(worker, *at, blocks);
  if (hidden_) {
    place_orphans(worker, blocks);
    show_placed(worker);
  }
}

Tree::Cursor Tree::cursor_behind(BlockId block) {
  const NodeId node = runs_.node(block);
  return {false, node, block - nodes_.info(node).start + 1};
}

void Tree::store_chain(WorkerId worker, Cursor at, std::span<const StoredBlock> blocks) {
  changes_.clear();
  while (!blocks.empty()) {
    if (at.at_root || at.used == length(at.node)) {
      const SpaceId space = at.at_root ? kRootSpace : nodes_.node(at.node)->children.load(std::memory_order_relaxed);
      const Edge edge = edges_.find(space, blocks[0].local);
      if (!edge) break;
      at = {false, edge.node, 0};
      if (memory_limit_ > 0) mark_used(at.node);
    }
    blocks = blocks.subspan(follow_run(worker, at, blocks));
    const bool parts = at.used < length(at.node) && !blocks.empty();
    const bool gains = !hidden_ && at.used > coverage(at.node, worker);
    if (parts || (gains && at.used < length(at.node) && !has_room_for_partial(at.node, worker))) {
      at.node = split(at.node, at.used);
    }
    if (gains) changes_.push_back({at.node, at.used});
    if (parts) break;
  }

  if (!blocks.empty()) {
    const std::size_t extended = at.at_root || hidden_ ? 0 : extend_leaf(worker, at, blocks);
    if (extended < blocks.size()) {
      Cursor end = at;
      end.used += static_cast<std::uint32_t>(extended);
      append_nodes(worker, end, blocks.subspan(extended));
    }
    if (extended > 0) {
      nodes_.node(at.node)->length.store(at.used + static_cast<std::uint32_t>(extended), std::memory_order_release);
      mark_used(at.node);
      bump_version(at.node);
      num_blocks_ += extended;
      held_[worker].fetch_add(extended, std::memory_order_relaxed);
    }
  }
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change) {
    set_coverage(change->node, worker, change->coverage);
  }
}

std::size_t Tree::follow_run(WorkerId worker, Cursor& at, std::span<const StoredBlock> blocks) {
  const BlockId begin = nodes_.info(at.node).start + at.used;
  const std::size_t limit = std::min<std::size_t>(length(at.node) - at.used, blocks.size());
  const std::atomic<LocalHash>* local = runs_.locals(begin);
  std::size_t n = 0;
  for (; n < limit && local[n].load(std::memory_order_relaxed) == blocks[n].local; ++n) {
    name_standing_block(worker, blocks[n].engine, begin + static_cast<BlockId>(n));
    if (hidden_) placed_.push_back(begin + static_cast<BlockId>(n));
  }
  at.used += static_cast<std::uint32_t>(n);
  return n;
}

std::size_t Tree::extend_leaf(WorkerId worker, const Cursor& at, std::span<const StoredBlock> blocks) {
  NodeInfo& info = nodes_.info(at.node);
  if (info.num_children > 0 || info.num_full != 1 || info.num_partial > 0 || at.used != length(at.node) ||
      coverage(at.node, worker) != at.used) {
    return 0;
  }
  const std::size_t wanted = std::min<std::size_t>(blocks.size(), RunStore::kMaxRun - at.used);
  if (at.used + wanted > info.capacity) {
    info.capacity +=
        runs_.extend(info.start + info.capacity, static_cast<std::uint32_t>(at.used + wanted - info.capacity));
  }
  const std::size_t extended = std::min<std::size_t>(wanted, info.capacity - at.used);
  fill_run(worker, at.node, info.start + at.used, blocks.first(extended));
  return extended;
}

void Tree::append_nodes(WorkerId worker, const Cursor& at, std::span<const StoredBlock> blocks) {
  appended_.clear();
  SpaceId parent = kRootSpace;
  std::uint32_t depth = 0;
  if (!at.at_root) {
    parent = nodes_.node(at.node)->children.load(std::memory_order_relaxed);
    depth = nodes_.info(at.node).depth + at.used;
    ++nodes_.info(at.node).num_children;
  }
  while (!blocks.empty()) {
    const auto count = static_cast<std::uint32_t>(std::min<std::size_t>(blocks.size(), RunStore::kMaxRun));
    const std::uint32_t room = RunStore::round_up(count <= kGrowingStep ? count + kGrowingRoom : count);
    const NodeId id = nodes_.allocate();
    NodeInfo& info = nodes_.info(id);
    info.start = runs_.allocate(room);
    info.capacity = room;
    info.depth = depth;
    info.num_children = count < blocks.size() ? 1 : 0;
    Node* node = nodes_.node(id);
    const SpaceId space = allocate_space(id);
    node->length.store(count, std::memory_order_relaxed);
    node->start.store(info.start, std::memory_order_relaxed);
    node->parent.store(parent, std::memory_order_relaxed);
    node->children.store(space, std::memory_order_relaxed);
    mark_used(id);
    if (!hidden_) {
      node->full()[worker / 64].store(std::uint64_t{1} << (worker % 64), std::memory_order_relaxed);
      info.num_full = 1;
      held_[worker].fetch_add(count, std::memory_order_relaxed);
    }
    fill_run(worker, id, info.start, blocks.first(count));
    appended_.push_back(id);
    num_blocks_ += count;
    blocks = blocks.subspan(count);
    parent = space;
    depth += count;
  }
  for (auto id = appended_.rbegin(); id != appended_.rend(); ++id) {
    enter_tree(*id);
    Node* node = nodes_.node(*id);
    const BlockId start = nodes_.info(*id).start;
    edges_.put(node->parent.load(std::memory_order_relaxed), runs_.locals(start)->load(std::memory_order_relaxed),
               {*id, start});
  }
}

void Tree::fill_run(WorkerId worker, NodeId node, BlockId begin, std::span<const StoredBlock> blocks) {
  PlacesAhead places(names_, blocks.size(), [&](std::size_t i) { return blocks[i].engine; });
  std::atomic<LocalHash>* local = runs_.locals(begin);
  EngineHash* engine = &runs_.engine(begin);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    local[i].store(blocks[i].local, std::memory_order_release);
    engine[i] = blocks[i].engine;
  }
  std::fill_n(&runs_.node(begin), blocks.size(), node);
  const WorkerNames& names = workers_[worker];
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const BlockId block = begin + static_cast<BlockId>(i);
    NameTable::Place& place = places.next();
    // The usual case, to save a call.
    if (engine[i] == kNoName || !names.plain() || names_.insert(place, engine[i], block) != NameTable::kNone) {
      name_new_block(worker, place, blocks[i].engine, block);
    }
    if (hidden_) placed_.push_back(block);
  }
}

// The orphans that waited for these blocks become visible with them, so all are placed before any is shown.
void Tree::place_orphans(WorkerId worker, std::span<const StoredBlock> parents) {
  WorkerNames& names = workers_[worker];
  std::vector<EngineHash> waited_for;
  for (const StoredBlock& block : parents) {
    names.orphans.remove(block.engine);
    waited_for.push_back(block.engine);
  }
  while (!waited_for.empty() && !contradicted_) {
    const EngineHash parent = waited_for.back();
    waited_for.pop_back();
    for (const StoredBlock& child : names.orphans.take_children(parent)) {
      const BlockId* alias = names.aliases.find(parent);
      const BlockId block = alias ? *alias : names_.find(parent);
      if (block == NameTable::kNone) continue;
      store_chain(worker, cursor_behind(block), {&child, 1});
      waited_for.push_back(child.engine);
    }
  }
}

void Tree::show_placed(WorkerId worker) {
  const auto end_in_node = [this](BlockId block) { return block - nodes_.info(runs_.node(block)).start + 1; };
  for (const BlockId block : placed_) {
    const NodeId node = runs_.node(block);
    if (end_in_node(block) < length(node) && end_in_node(block) > coverage(node, worker) &&
        !has_room_for_partial(node, worker)) {
      split(node, end_in_node(block));
    }
  }
  const auto deeper = [&](BlockId a, BlockId b) {
    return nodes_.info(runs_.node(a)).depth + end_in_node(a) > nodes_.info(runs_.node(b)).depth + end_in_node(b);
  };
  std::sort(placed_.begin(), placed_.end(), deeper);
  for (const BlockId block : placed_) {
    const NodeId node = runs_.node(block);
    if (end_in_node(block) > coverage(node, worker)) set_coverage(node, worker, end_in_node(block));
  }
}

}  // namespace kvrouter
