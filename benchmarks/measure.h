// What the benchmark programs measure with: one clock, resident memory, percentiles, cores.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvrouter::bench {

// Monotonic time in nanoseconds.
std::uint64_t now_ns();

// Resident memory of this process in bytes, as /proc/self/statm has it.
std::uint64_t resident_bytes();

// Uses half a gigabyte and gives it back to the system.  On a virtual machine, memory that the host has taken back
// costs several times as much at first touch as other memory; which one a program gets is chance.  After this it is
// other.
void warm_memory();

// `after` - `before`, or 0 when memory shrank.
std::uint64_t growth(std::uint64_t before, std::uint64_t after);

// Puts the calling thread on one core of those it may use: the `number`th, in turn when there are fewer.
void pin_to_core(std::size_t number);

// How many cores this process may use.
std::size_t usable_cores();

// The value at rank floor((n - 1) * q) of `values`, which are sorted for it; 0 if there are none.
std::uint64_t percentile(std::vector<std::uint64_t>& values, double q);

// Durations of a reader that runs for a while: exact below 4,096 ns, within 1/64 above.  Its memory is fixed, so that
// recording disturbs what is measured as little as it can.  Not safe for threads: one a thread, merged at the end.
class DurationHistogram {
 public:
  void record(std::uint64_t ns);
  void add(const DurationHistogram& other);
  std::uint64_t count() const { return count_; }
  std::uint64_t total_ns() const { return total_ns_; }
  std::uint64_t max_ns() const { return max_ns_; }
  // The duration at rank floor((n - 1) * q); 0 without records.
  std::uint64_t percentile(double q) const;

 private:
  static constexpr std::size_t kExact = 4096;
  static constexpr std::size_t kSubBits = 6;
  static constexpr std::size_t kOctaves = 28;  // from 2^12 ns up to 2^40, a quarter of an hour
  static constexpr std::size_t kBuckets = kExact + (kOctaves << kSubBits);

  static std::size_t bucket_of(std::uint64_t ns);
  static std::uint64_t middle_of(std::size_t bucket);

  std::array<std::uint32_t, kBuckets> buckets_{};
  std::uint64_t count_ = 0;
  std::uint64_t total_ns_ = 0;
  std::uint64_t max_ns_ = 0;
};

}  // namespace kvrouter::bench
