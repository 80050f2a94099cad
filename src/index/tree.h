// The radix tree: the writer's side.
//
// Paths are compressed: a node stands for a run of blocks, and is split where requests part or where a worker loses a
// block in the middle.  Nodes that nobody holds and that lead nowhere are taken out.  node.h says how readers follow.
//
// A worker that calls two different prefixes by one name contradicts itself.  It is not known then what its other
// names mean; all that it holds is forgotten, and the event that showed it is applied to the empty state.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "index/edge_table.h"
#include "index/name_table.h"
#include "index/node.h"
#include "index/run_store.h"
#include "index/worker_names.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {

class Tree {
 public:
  // memory_limit: bytes; 0: none.
  Tree(std::size_t num_workers, std::size_t memory_limit);

  // As in PrefixIndex; one caller at a time.
  void store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks);
  void remove(WorkerId worker, std::span<const EngineHash> names);
  void clear(WorkerId worker);
  void add_to(PrefixIndexStats& stats) const;
  std::vector<EngineHash> worker_blocks(WorkerId worker);
  std::vector<StoredChain> worker_chains(WorkerId worker);

  // For readers, at any time.
  const NodeLayout& layout() const { return layout_; }
  const EdgeTable& edges() const { return edges_; }
  const Node* node(NodeId id) const { return nodes_.node(id); }
  const std::atomic<LocalHash>* run(BlockId start) const { return runs_.locals(start); }
  std::size_t num_workers() const { return num_workers_; }
  // What the clock of Node::used says.
  std::uint32_t now() const { return now_.load(std::memory_order_relaxed); }
  std::size_t held_blocks(WorkerId worker) const { return held_[worker].load(std::memory_order_relaxed); }

 private:
  // Behind which block of which node the next block of a chain goes; or at the start of a sequence.
  struct Cursor {
    bool at_root = true;
    NodeId node = 0;
    std::uint32_t used = 0;  // blocks of the node's run before the next one
  };
  // A worker will hold this much of a node's run.
  struct Change {
    NodeId node;
    std::uint32_t coverage;
  };

  // --- names (tree_names.cc) ---
  // Of a block without a common name.  A worker that does call a block so has an alias for it.
  static constexpr EngineHash kNoName = 0;
  std::optional<BlockId> find_held(WorkerId worker, EngineHash name);
  bool holds_by_common_name(WorkerId worker, BlockId block);
  // The worker is about to hold `block`, which stands in the tree, by this name.
  void name_standing_block(WorkerId worker, EngineHash name, BlockId block);
  // The same for a block that nobody has held before.
  void name_new_block(WorkerId worker, NameTable::Place& place, EngineHash name, BlockId block);
  void forget_names(BlockId begin, BlockId end);
  void add_orphan(WorkerNames& names, EngineHash parent, StoredBlock block);

  // --- storing (tree_store.cc) ---
  void try_store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks);
  Cursor cursor_behind(BlockId block);
  void store_chain(WorkerId worker, Cursor at, std::span<const StoredBlock> blocks);
  // Blocks that the run at the cursor has already; moves the cursor over them.
  std::size_t follow_run(WorkerId worker, Cursor& at, std::span<const StoredBlock> blocks);
  // Puts as many blocks as fit behind the run, if it is a leaf that the worker alone holds.  They are not seen yet.
  std::size_t extend_leaf(WorkerId worker, const Cursor& at, std::span<const StoredBlock> blocks);
  void append_nodes(WorkerId worker, const Cursor& at, std::span<const StoredBlock> blocks);
  void fill_run(WorkerId worker, NodeId node, BlockId begin, std::span<const StoredBlock> blocks);
  void place_orphans(WorkerId worker, std::span<const StoredBlock> parents);
  void show_placed(WorkerId worker);

  // --- coverage (tree_coverage.cc) ---
  std::uint32_t coverage(NodeId node, WorkerId worker);
  std::uint32_t coverage_of_others(NodeId node, WorkerId worker);
  std::atomic<std::uint64_t>* partial_entry(NodeId node, WorkerId worker);  // nullptr: none
  bool has_room_for_partial(NodeId node, WorkerId worker);
  void set_coverage(NodeId node, WorkerId worker, std::uint32_t depth);
  void lose_blocks(WorkerId worker, std::span<BlockId> blocks);
  bool plan_tail_losses(WorkerId worker, std::span<const BlockId> blocks);
  void plan_losses(WorkerId worker, std::span<BlockId> blocks);
  void publish_losses(WorkerId worker);

  // --- shape (tree_shape.cc) ---
  bool in_tree(NodeId node) { return nodes_.node(node)->version.load(std::memory_order_relaxed) % 2 == 0; }
  std::uint32_t length(NodeId node) { return nodes_.node(node)->length.load(std::memory_order_relaxed); }
  void bump_version(NodeId node);
  NodeId split(NodeId node, std::uint32_t at);  // the first half; the second is its only child
  void copy_coverage(NodeId from, std::uint32_t begin, std::uint32_t end, NodeId to);
  void enter_tree(NodeId node);
  // Takes out what nobody holds, from this node up.
  void tidy(NodeId node);
  void truncate(NodeId node, std::uint32_t length);
  void take_out(NodeId node);
  SpaceId allocate_space(NodeId owner);

  // --- the memory limit (tree_limit.cc) ---
  void mark_used(NodeId node) { nodes_.node(node)->used.store(now(), std::memory_order_relaxed); }
  // After an event of `worker`: counts its names anew, and gives up what is over the limit.
  void keep_limit(WorkerId worker);
  void count_names(WorkerId worker);
  std::size_t memory() const;
  NodeId least_valuable_leaf();
  void give_up(NodeId leaf);

  std::size_t num_workers_;
  NodeLayout layout_;
  std::atomic<std::uint32_t> now_{0};
  RunStore runs_;
  NameTable names_{runs_};
  NodePool nodes_;
  EdgeTable edges_{nodes_, runs_};
  // From here on writer only, and not beside what readers read.
  alignas(kCacheLine) std::vector<NodeId> space_owner_ = {0};  // by space; the root's is not used
  std::vector<SpaceId> free_spaces_;
  std::vector<WorkerNames> workers_;
  std::unique_ptr<std::atomic<std::size_t>[]> held_;  // blocks, by worker
  std::size_t num_blocks_ = 0;                        // in the tree
  std::uint64_t orphans_dropped_ = 0;
  std::uint64_t unknown_removals_ = 0;

  std::uint64_t contradictions_ = 0;

  std::size_t memory_limit_;           // bytes; 0: none
  std::size_t max_orphans_;            // of a worker
  std::size_t names_bytes_ = 0;        // of all workers_
  std::size_t stored_since_tick_ = 0;  // blocks
  std::uint64_t given_up_ = 0;         // blocks
  std::uint64_t random_ = 1;
  NodeId hand_ = 0;

  // Working memory of one event.
  std::vector<Change> changes_;
  std::vector<BlockId> lost_;
  std::vector<NodeId> appended_;
  bool contradicted_ = false;
  bool hidden_ = false;  // the event's blocks are placed without coverage, and shown together in the end
  std::vector<BlockId> placed_;
};

}  // namespace kvrouter
