// The edges of the tree: from (space of children, first local hash) to the child.
//
// A slot is eight bytes: the child's number, where its run begins, and ten bits of the edge's hash.  What the edge is
// stands in the child itself: its parent and the first block of its run, which whoever follows the edge reads anyhow.
// Both are fetched at once, which is why the slot tells where the run begins.
//
// One writer, any number of readers that take no lock.  When the table is full it is built anew in another array.
// Arrays are kept and used again, never given back, so a reader that still looks at a replaced one reads mapped memory;
// it sees by generation() that it has to look again.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "index/arena.h"
#include "index/fetch.h"
#include "index/node.h"

namespace kvrouter {

// Where an edge leads.  Node 0 is none.
struct Edge {
  NodeId node = 0;
  BlockId start = 0;

  explicit operator bool() const { return node != 0; }
};

class EdgeTable {
 public:
  EdgeTable(const NodePool& nodes, const RunStore& runs) : nodes_(nodes), runs_(runs) {
    std::random_device random;
    salt_ = std::uint64_t{random()} << 32 | random();
    array_.store(make_array(64), std::memory_order_relaxed);
  }

  // Readers: note generation(), look up, and look at generation() again.
  std::uint32_t generation() const { return generation_.load(std::memory_order_acquire); }

  // Where to begin to look; fetched.
  std::uint64_t place(SpaceId space, LocalHash local) const {
    const Array& array = *array_.load(std::memory_order_acquire);
    const std::uint64_t k = hash(space, local);
    fetch(&array.slots[k & array.mask]);
    return k;
  }
  Edge find(SpaceId space, LocalHash local) const { return find(hash(space, local), space, local); }
  // REQUIRES: k == place(space, local).
  Edge find(std::uint64_t k, SpaceId space, LocalHash local) const {
    const Array& array = *array_.load(std::memory_order_acquire);
    for (std::size_t i = k & array.mask;; i = (i + 1) & array.mask) {
      const std::uint64_t slot = array.slots[i].load(std::memory_order_acquire);
      if (slot == kEmpty) return {};
      if (!may_be(slot, k)) continue;
      if (is(slot, space, local)) return edge_of(slot);
      // Another edge; or this one, whose child has been replaced in between, and become another node.
      if (array.slots[i].load(std::memory_order_acquire) != slot) i = (i - 1) & array.mask;
    }
  }

  // Points the edge to `child`, whether it was there or not.
  void put(SpaceId space, LocalHash local, Edge child) {
    const std::uint64_t k = hash(space, local);
    Array* array = array_.load(std::memory_order_relaxed);
    std::atomic<std::uint64_t>* gone = nullptr;
    for (std::size_t i = k & array->mask;; i = (i + 1) & array->mask) {
      std::atomic<std::uint64_t>& at = array->slots[i];
      const std::uint64_t slot = at.load(std::memory_order_relaxed);
      if (slot == kGone && !gone) gone = &at;
      if (slot != kEmpty && !(may_be(slot, k) && is(slot, space, local))) continue;
      if (slot != kEmpty) return at.store(pack(child, k), std::memory_order_release);
      ++live_;
      if (gone) return gone->store(pack(child, k), std::memory_order_release);
      ++used_;
      at.store(pack(child, k), std::memory_order_release);
      break;
    }
    if (used_ * 10 > array->size() * 7) rebuild();
  }

  // Takes the edge out if it leads to `child`.
  void erase(SpaceId space, LocalHash local, NodeId child) {
    const std::uint64_t k = hash(space, local);
    Array* array = array_.load(std::memory_order_relaxed);
    for (std::size_t i = k & array->mask;; i = (i + 1) & array->mask) {
      const std::uint64_t slot = array->slots[i].load(std::memory_order_relaxed);
      if (slot == kEmpty) return;
      if (edge_of(slot).node != child) continue;
      array->slots[i].store(kGone, std::memory_order_release);
      --live_;
      return;
    }
  }

 private:
  static constexpr unsigned kTagBits = 64 - NodePool::kNodeBits - RunStore::kBlockBits;
  static constexpr std::uint64_t kNodeMask = (std::uint64_t{1} << NodePool::kNodeBits) - 1;
  static constexpr std::uint64_t kEmpty = 0;
  static constexpr std::uint64_t kGone = kNodeMask + 1;  // node 0

  struct Array {
    explicit Array(std::size_t size) : mask(size - 1), slots(size) { slots.grow(size); }
    std::size_t size() const { return mask + 1; }
    const std::size_t mask;
    Arena<std::atomic<std::uint64_t>> slots;
  };

  std::uint64_t hash(SpaceId space, LocalHash local) const {
    std::uint64_t k = (local ^ salt_) + space * 0x9E3779B97F4A7C15ull;
    k = (k ^ (k >> 32)) * 0xD6E8FEB86659FD93ull;
    return k ^ (k >> 32);
  }
  static std::uint64_t pack(Edge edge, std::uint64_t k) {
    return k >> (64 - kTagBits) << (64 - kTagBits) | std::uint64_t{edge.start} << NodePool::kNodeBits | edge.node;
  }
  static Edge edge_of(std::uint64_t slot) {
    constexpr std::uint64_t kBlockMask = (std::uint64_t{1} << RunStore::kBlockBits) - 1;
    return {static_cast<NodeId>(slot & kNodeMask), static_cast<BlockId>(slot >> NodePool::kNodeBits & kBlockMask)};
  }
  static bool may_be(std::uint64_t slot, std::uint64_t k) {
    return (slot ^ k) >> (64 - kTagBits) == 0 && (slot & kNodeMask) != 0;
  }
  bool is(std::uint64_t slot, SpaceId space, LocalHash local) const {
    const Edge edge = edge_of(slot);
    const std::atomic<LocalHash>* run = runs_.locals(edge.start);
    fetch(run);
    return nodes_.node(edge.node)->parent.load(std::memory_order_acquire) == space &&
           run->load(std::memory_order_acquire) == local;
  }

  Array* make_array(std::size_t size) {
    arrays_.push_back(std::make_unique<Array>(size));
    return arrays_.back().get();
  }
  // An array of this size that is not in use.
  Array* spare_array(std::size_t size, const Array* in_use) {
    for (const auto& array : arrays_) {
      if (array->size() != size || array.get() == in_use) continue;
      for (std::size_t i = 0; i < size; ++i) array->slots[i].store(kEmpty, std::memory_order_release);
      return array.get();
    }
    return make_array(size);
  }

  // Without what is gone, in an array that is at most half full.
  void rebuild() {
    constexpr std::size_t kAhead = 16;
    const Array* old = array_.load(std::memory_order_relaxed);
    std::size_t size = 64;
    while (size < live_ * 2 + 2) size *= 2;
    // Those who look at the spare array, because it was in use once, shall notice before it changes.
    generation_.store(generation_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    Array* fresh = spare_array(size, old);
    for (std::size_t i = 0; i < old->size(); ++i) {
      const Edge ahead = edge_of(old->slots[(i + kAhead) & old->mask].load(std::memory_order_relaxed));
      fetch(nodes_.node(ahead.node));
      fetch(runs_.locals(ahead.start));
      const Edge edge = edge_of(old->slots[i].load(std::memory_order_relaxed));
      if (!edge) continue;
      const std::uint64_t k = hash(nodes_.node(edge.node)->parent.load(std::memory_order_relaxed),
                                   runs_.locals(edge.start)->load(std::memory_order_relaxed));
      std::size_t at = k & fresh->mask;
      while (fresh->slots[at].load(std::memory_order_relaxed) != kEmpty) at = (at + 1) & fresh->mask;
      fresh->slots[at].store(pack(edge, k), std::memory_order_release);
    }
    used_ = live_;
    array_.store(fresh, std::memory_order_release);
  }

  const NodePool& nodes_;
  const RunStore& runs_;
  std::uint64_t salt_ = 0;
  std::atomic<Array*> array_;
  std::atomic<std::uint32_t> generation_{0};
  // Writer only, and in a cache line of its own: readers shall not feel it change.
  alignas(kCacheLine) std::size_t used_ = 0;  // slots that are not empty
  std::size_t live_ = 0;
  std::vector<std::unique_ptr<Array>> arrays_;
};

}  // namespace kvrouter
