// A node of the tree: a run of blocks, and how many of them, from the first on, each worker holds.
//
// One writer changes nodes; any number of readers walk them at the same time without a lock.  Nodes lie in a pool that
// never moves and is never given back, so a reader may look at a node that has meanwhile been retired or become
// another; the version tells:
//
// - Odd: the node is not in the tree.  A reader that meets one has followed a link that has been replaced: it walks
//   again from the root.
// - The version grows whenever something about the node has changed that makes what was read before useless: a worker
//   holds fewer blocks, the run has become longer, the node was retired.  It grows after the change, and before
//   anything else changes.  A reader notes the version before the node's fields and looks again at the end of its
//   walk; if any node's has grown, it walks again.
//
// Why this makes events whole: a store is published deepest node first, so a reader that sees its shallowest part sees
// the rest; a removal is published shallowest first, so a reader that sees a deeper part without the shallowest finds
// that node's version grown.
//
// Coverage: a worker that holds the whole run has a bit in `full`; one that holds some of its leading blocks has an
// entry in `partial`.  The bit counts if both are there, which happens for a moment when one follows the other; never
// is neither there.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "index/arena.h"
#include "index/run_store.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {

using SpaceId = std::uint32_t;  // where a node's children are found in the edge table
inline constexpr SpaceId kRootSpace = 0;

// What readers see.  The sizes of the two arrays depend on the number of workers: `full` has Layout::words words,
// behind which `partial` has Layout::partials entries.
struct alignas(64) Node {
  std::atomic<std::uint32_t> version;
  std::atomic<std::uint32_t> length;  // blocks
  std::atomic<BlockId> start;         // of the run
  std::atomic<SpaceId> children;      // space of its children
  std::atomic<SpaceId> parent;        // space in which it is a child
  // When the node was last found or stored, on the tree's clock (tree_limit.cc); stands still without a memory limit.
  // Readers write it, at most once a node and tick.
  mutable std::atomic<std::uint32_t> used;

  std::atomic<std::uint64_t>* full() { return reinterpret_cast<std::atomic<std::uint64_t>*>(this) + 3; }
  const std::atomic<std::uint64_t>* full() const {
    return reinterpret_cast<const std::atomic<std::uint64_t>*>(this) + 3;
  }
};

// An entry of `partial`: 0 if empty.
struct Partial {
  static std::uint64_t make(WorkerId worker, std::uint32_t depth) { return std::uint64_t{worker} << 32 | depth; }
  static WorkerId worker(std::uint64_t entry) { return static_cast<WorkerId>(entry >> 32); }
  static std::uint32_t depth(std::uint64_t entry) { return static_cast<std::uint32_t>(entry); }
};

struct NodeLayout {
  explicit NodeLayout(std::size_t num_workers)
      : words((num_workers + 63) / 64),
        bytes((24 + 8 * (words + 4) + 63) / 64 * 64),
        partials((bytes - 24) / 8 - words) {}

  std::atomic<std::uint64_t>* partial(Node* node) const { return node->full() + words; }
  const std::atomic<std::uint64_t>* partial(const Node* node) const { return node->full() + words; }

  std::size_t words;
  std::size_t bytes;     // of a node; whole cache lines
  std::size_t partials;  // at least 4
};

// What only the writer needs of a node.
struct NodeInfo {
  BlockId start = 0;           // of the run
  std::uint32_t capacity = 0;  // blocks that the run has room for
  std::uint32_t num_children = 0;
  std::uint32_t depth = 0;     // blocks before the run
  std::uint32_t num_full = 0;  // workers that hold all of it
  std::uint32_t num_partial = 0;
};

class NodePool {
 public:
  static constexpr unsigned kNodeBits = 26;  // of a node's number

  explicit NodePool(const NodeLayout& layout) : layout_(layout), nodes_(kMaxNodes * layout.bytes), info_(kMaxNodes) {}

  // A node outside of the tree (its version is odd), without coverage.  Throws std::bad_alloc.
  NodeId allocate() {
    NodeId id = 0;
    if (!free_.empty()) {
      id = free_.back();
      free_.pop_back();
      Node* n = node(id);
      for (std::size_t i = 0; i < layout_.words + layout_.partials; ++i) {
        n->full()[i].store(0, std::memory_order_relaxed);
      }
    } else {
      id = size_;
      nodes_.grow((std::size_t{id} + 1) * layout_.bytes);
      info_.grow(std::size_t{id} + 1);
      ++size_;
      node(id)->version.store(1, std::memory_order_relaxed);
    }
    info_[id] = {};
    return id;
  }
  // REQUIRES: no link leads to the node any more.
  void retire(NodeId id) {
    Node* n = node(id);
    n->version.store(n->version.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    free_.push_back(id);
  }

  Node* node(NodeId id) const { return reinterpret_cast<Node*>(nodes_.data() + id * layout_.bytes); }
  NodeInfo& info(NodeId id) { return info_[id]; }
  // Ids are kFirst to end() - 1; those of odd version are not in the tree.
  static constexpr NodeId kFirst = 1;
  NodeId end() const { return size_; }
  std::size_t num_allocated() const { return size_ - kFirst - free_.size(); }

 private:
  static constexpr std::size_t kMaxNodes = std::size_t{1} << kNodeBits;

  NodeLayout layout_;
  Arena<char> nodes_;
  Arena<NodeInfo> info_;
  alignas(kCacheLine) NodeId size_ = kFirst;  // not beside what readers read
  std::vector<NodeId> free_;
};

}  // namespace kvrouter
