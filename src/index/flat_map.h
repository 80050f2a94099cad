// An open-addressing hash map from 64-bit keys to small trivially copyable values: linear probing, deletion by
// shifting back (no tombstones, so that a table which turns over for ever never needs cleaning), load at most 7/8.
// Any key is allowed.  Pointers to values are valid until the next insert or erase.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvrouter {

template <typename Value>
class FlatMap {
  static_assert(std::is_trivially_copyable_v<Value>);

 public:
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  Value* find(std::uint64_t key) {
    const std::size_t slot = slot_of(key);
    return slot == kNone ? nullptr : &slots_[slot].value;
  }
  const Value* find(std::uint64_t key) const { return const_cast<FlatMap*>(this)->find(key); }

  // The value of `key`, which is `initial` if it was not there; and whether it was put in.
  std::pair<Value*, bool> insert(std::uint64_t key, const Value& initial) {
    if ((size_ + 1) * 8 > slots_.size() * 7) grow();
    std::size_t i = home(key);
    for (; slots_[i].used; i = next(i)) {
      if (slots_[i].key == key) return {&slots_[i].value, false};
    }
    slots_[i] = {key, initial, true};
    ++size_;
    return {&slots_[i].value, true};
  }

  bool erase(std::uint64_t key) {
    std::size_t hole = slot_of(key);
    if (hole == kNone) return false;
    for (std::size_t i = next(hole); slots_[i].used; i = next(i)) {
      // An entry may move into the hole unless its home lies strictly between the hole and itself.
      if (((i - home(slots_[i].key)) & mask()) >= ((i - hole) & mask())) {
        slots_[hole] = slots_[i];
        hole = i;
      }
    }
    slots_[hole].used = false;
    --size_;
    return true;
  }

  template <typename Visit>  // (key, value)
  void for_each(Visit visit) const {
    for (const Slot& slot : slots_) {
      if (slot.used) visit(slot.key, slot.value);
    }
  }

  // Also gives the memory back.
  void clear() {
    slots_ = {};
    size_ = 0;
  }

 private:
  struct Slot {
    std::uint64_t key;
    Value value;
    bool used;
  };
  static constexpr std::size_t kNone = ~std::size_t{0};

  std::size_t mask() const { return slots_.size() - 1; }
  std::size_t next(std::size_t i) const { return (i + 1) & mask(); }
  std::size_t home(std::uint64_t key) const {
    key ^= key >> 32;
    key *= 0x9E3779B97F4A7C15ull;
    return static_cast<std::size_t>(key ^ (key >> 29)) & mask();
  }
  std::size_t slot_of(std::uint64_t key) const {
    if (slots_.empty()) return kNone;
    for (std::size_t i = home(key); slots_[i].used; i = next(i)) {
      if (slots_[i].key == key) return i;
    }
    return kNone;
  }
  void grow() {
    std::vector<Slot> old(slots_.empty() ? 16 : slots_.size() * 2, Slot{});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (!slot.used) continue;
      std::size_t i = home(slot.key);
      while (slots_[i].used) i = next(i);
      slots_[i] = slot;
    }
  }

  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

}  // namespace kvrouter
