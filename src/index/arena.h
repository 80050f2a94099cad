// An array that grows without moving: a range of addresses is reserved at once and backed by memory as it is used.
//
// Readers may hold pointers into it for ever, an element is found by one addition, and growing copies nothing.
// Elements begin as zero bytes.  Behind the first two megabytes huge pages are asked for: look-ups at random are bound
// by address translation otherwise, while an index of a few thousand blocks has no memory to give away.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

namespace kvrouter {

inline constexpr std::size_t kCacheLine = 64;

// The untyped part.  Throws std::bad_alloc if not even a small range can be reserved.
class AddressRange {
 public:
  explicit AddressRange(std::size_t bytes) {
    // Where addresses are scarce (ulimit -v) a smaller range is taken.
    for (reserved_ = round_up(bytes);; reserved_ = round_up(reserved_ / 2)) {
      mapped_ = mmap(nullptr, reserved_ + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped_ != MAP_FAILED) break;
      if (reserved_ <= kHugePage) throw std::bad_alloc();
    }
    const auto address = reinterpret_cast<std::uintptr_t>(mapped_);
    begin_ = reinterpret_cast<char*>(round_up(address));
  }
  ~AddressRange() { munmap(mapped_, reserved_ + kHugePage); }
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;

  char* begin() const { return begin_; }

  // Makes the first `bytes` usable.  Throws std::bad_alloc beyond the range, or if the system refuses.
  void ensure(std::size_t bytes) {
    if (bytes <= usable_) return;
    if (bytes > reserved_) throw std::bad_alloc();
    const std::size_t wanted = std::min(reserved_, std::max(round_up(bytes), usable_ + usable_ / 4));
    const std::size_t next = round_up(wanted);
    if (mprotect(begin_ + usable_, next - usable_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    const std::size_t first_huge = std::max(usable_, kHugePage);
    if (next > first_huge) (void)madvise(begin_ + first_huge, next - first_huge, MADV_HUGEPAGE);  // only advice
    usable_ = next;
  }

 private:
  static constexpr std::size_t kHugePage = 2 * 1024 * 1024;
  static constexpr std::size_t round_up(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

  void* mapped_ = nullptr;
  char* begin_ = nullptr;
  std::size_t reserved_ = 0;  // bytes, from begin_ on
  std::size_t usable_ = 0;
};

template <typename T>
class Arena {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  explicit Arena(std::size_t max_size) : range_(max_size * sizeof(T)) {}

  // REQUIRES (of all that is read or written): grow() has made room for it.
  T* data() const { return reinterpret_cast<T*>(range_.begin()); }
  T& operator[](std::size_t i) const { return data()[i]; }
  // Room for elements 0 to `size` - 1.  Throws std::bad_alloc.
  void grow(std::size_t size) { range_.ensure(size * sizeof(T)); }

 private:
  AddressRange range_;
};

}  // namespace kvrouter
