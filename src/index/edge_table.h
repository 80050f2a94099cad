// The edges of the tree: from (space of children, first local hash) to the child, and to where its run begins, so that
// a reader fetches both at once.
//
// One writer, any number of readers that take no lock.  An entry, once in the table, never moves: a removed one stays
// as a tombstone that the same edge may use again.  When the table is full it is built anew in another array.  Arrays
// are kept and used again, never given back, so a reader that still looks at a replaced one reads mapped memory; it
// sees by generation() that it has to look again.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

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
  EdgeTable() { array_.store(make_array(64), std::memory_order_relaxed); }

  // Readers: note generation(), look up, and look at generation() again.
  std::uint32_t generation() const { return generation_.load(std::memory_order_acquire); }

  Edge find(SpaceId space, LocalHash local) const {
    const Slot* slot = slot_of(*array_.load(std::memory_order_acquire), key(space, local));
    return slot ? unpack(slot->edge.load(std::memory_order_acquire)) : Edge{};
  }

  // Points the edge to `child`, whether it was there or not.
  void put(SpaceId space, LocalHash local, Edge child) {
    const std::uint64_t k = key(space, local);
    Array* array = array_.load(std::memory_order_relaxed);
    if (Slot* slot = slot_of(*array, k)) {
      live_ += slot->edge.load(std::memory_order_relaxed) == 0;
      slot->edge.store(pack(child), std::memory_order_release);
      return;
    }
    if ((used_ + 1) * 10 > array->size() * 7) array = rebuild();
    Slot& slot = empty_slot(*array, k);
    slot.edge.store(pack(child), std::memory_order_relaxed);
    slot.key.store(k, std::memory_order_release);
    ++used_;
    ++live_;
  }

  // Takes the edge out if it leads to `child`.
  void erase(SpaceId space, LocalHash local, NodeId child) {
    Slot* slot = slot_of(*array_.load(std::memory_order_relaxed), key(space, local));
    if (!slot || unpack(slot->edge.load(std::memory_order_relaxed)).node != child) return;
    slot->edge.store(0, std::memory_order_release);
    --live_;
  }

 private:
  struct Slot {
    std::atomic<std::uint64_t> key;   // 0: empty
    std::atomic<std::uint64_t> edge;  // 0: none
  };
  struct Array {
    explicit Array(std::size_t size) : mask(size - 1), slots(size) { slots.grow(size); }
    std::size_t size() const { return mask + 1; }
    const std::size_t mask;
    Arena<Slot> slots;
  };

  static std::uint64_t pack(Edge edge) { return std::uint64_t{edge.start} << 32 | edge.node; }
  static Edge unpack(std::uint64_t edge) {
    return {static_cast<NodeId>(edge), static_cast<BlockId>(edge >> 32)};
  }

  // A bijection of the local hash for each space.  Edges of different spaces may share a key (a collision of 64-bit
  // hashes, or an attack): the later one takes the slot, and the other's subtree is not found any more.
  static std::uint64_t key(SpaceId space, LocalHash local) {
    std::uint64_t k = local + space * 0x9E3779B97F4A7C15ull;
    k = (k ^ (k >> 32)) * 0xD6E8FEB86659FD93ull;
    k ^= k >> 32;
    return k ? k : 1;
  }

  static Slot* slot_of(const Array& array, std::uint64_t k) {
    for (std::size_t i = k & array.mask;; i = (i + 1) & array.mask) {
      const std::uint64_t found = array.slots[i].key.load(std::memory_order_acquire);
      if (found == k) return &array.slots[i];
      if (found == 0) return nullptr;
    }
  }
  static Slot& empty_slot(Array& array, std::uint64_t k) {
    std::size_t i = k & array.mask;
    while (array.slots[i].key.load(std::memory_order_relaxed) != 0) i = (i + 1) & array.mask;
    return array.slots[i];
  }

  Array* make_array(std::size_t size) {
    arrays_.push_back(std::make_unique<Array>(size));
    return arrays_.back().get();
  }
  // An array of this size that is not in use.
  Array* spare_array(std::size_t size, const Array* in_use) {
    for (const auto& array : arrays_) {
      if (array->size() != size || array.get() == in_use) continue;
      for (std::size_t i = 0; i < size; ++i) {
        array->slots[i].key.store(0, std::memory_order_release);
        array->slots[i].edge.store(0, std::memory_order_release);
      }
      return array.get();
    }
    return make_array(size);
  }

  // Without tombstones, in an array that is at most half full.
  Array* rebuild() {
    const Array* old = array_.load(std::memory_order_relaxed);
    std::size_t size = 64;
    while (size < live_ * 2 + 2) size *= 2;
    // Those who look at the spare array, because it was in use once, shall notice before it changes.
    generation_.store(generation_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    Array* fresh = spare_array(size, old);
    for (std::size_t i = 0; i < old->size(); ++i) {
      const std::uint64_t edge = old->slots[i].edge.load(std::memory_order_relaxed);
      if (edge == 0) continue;
      const std::uint64_t k = old->slots[i].key.load(std::memory_order_relaxed);
      Slot& slot = empty_slot(*fresh, k);
      slot.edge.store(edge, std::memory_order_relaxed);
      slot.key.store(k, std::memory_order_release);
    }
    used_ = live_;
    array_.store(fresh, std::memory_order_release);
    return fresh;
  }

  std::atomic<Array*> array_;
  std::atomic<std::uint32_t> generation_{0};
  std::size_t used_ = 0;  // entries, tombstones included
  std::size_t live_ = 0;
  std::vector<std::unique_ptr<Array>> arrays_;
};

}  // namespace kvrouter
