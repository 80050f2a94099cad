// Memory in huge pages where the system gives them: look-ups at random in tens of megabytes are bound by the TLB
// otherwise.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace kvrouter {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// Not initialised; a page costs memory once it is used.  Throws std::bad_alloc.
template <typename T>
std::unique_ptr<T[], FreeMemory> allocate_memory(std::size_t count) {
  constexpr std::size_t kHugePage = 2 * 1024 * 1024;
  const std::size_t bytes = count * sizeof(T);
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (!memory) throw std::bad_alloc();
  if (alignment == kHugePage) (void)madvise(memory, rounded, MADV_HUGEPAGE);  // only advice
  return std::unique_ptr<T[], FreeMemory>(static_cast<T*>(memory));
}

}  // namespace kvrouter
