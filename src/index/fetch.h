#pragma once

namespace kvrouter {

// Asks for a cache line that is wanted soon.
inline void fetch(const void* address) {
  __builtin_prefetch(address);
  // GCC takes a function that only prefetches for one without effect, and leaves out the calls of it.
  asm volatile("");
}

}  // namespace kvrouter
