// A histogram of durations with a relative error of at most 1/16, whatever their size: 16 buckets an octave.
// Threads: record() from any thread, wait-free; percentile() sees all that was recorded before it, and some of what
// is recorded meanwhile.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvrouter {

class LatencyHistogram {
 public:
  void record(std::uint64_t nanoseconds) { buckets_[bucket_of(nanoseconds)].fetch_add(1, std::memory_order_relaxed); }

  std::uint64_t count() const {
    std::uint64_t total = 0;
    for (const auto& bucket : buckets_) total += bucket.load(std::memory_order_relaxed);
    return total;
  }

  // Records of at most this duration, to a bucket's width.
  std::uint64_t count_up_to(double nanoseconds) const {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < kBuckets && middle_of(i) <= nanoseconds; ++i) {
      total += buckets_[i].load(std::memory_order_relaxed);
    }
    return total;
  }
  double sum() const {
    double total = 0;
    for (std::size_t i = 0; i < kBuckets; ++i) {
      total += static_cast<double>(buckets_[i].load(std::memory_order_relaxed)) * middle_of(i);
    }
    return total;
  }

  // The duration in nanoseconds (its bucket's middle) below which a share `q` of the records lies; 0 without records.
  double percentile(double q) const {
    const std::uint64_t total = count();
    if (total == 0) return 0;
    const double target = q * static_cast<double>(total);
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < kBuckets; ++i) {
      seen += buckets_[i].load(std::memory_order_relaxed);
      if (seen > 0 && static_cast<double>(seen) >= target) return middle_of(i);
    }
    return middle_of(kBuckets - 1);
  }

 private:
  static constexpr std::size_t kSubBits = 4;
  static constexpr std::size_t kSub = 1 << kSubBits;
  static constexpr std::size_t kOctaves = 40;  // up to 2^43 ns, over two hours
  static constexpr std::size_t kBuckets = kSub * kOctaves;

  static std::size_t bucket_of(std::uint64_t value) {
    if (value < kSub) return static_cast<std::size_t>(value);
    const std::size_t octave = static_cast<std::size_t>(std::bit_width(value)) - kSubBits;  // 1, 2, ...
    const std::size_t sub = static_cast<std::size_t>(value >> (octave - 1)) - kSub;
    const std::size_t bucket = octave * kSub + sub;
    return bucket < kBuckets ? bucket : kBuckets - 1;
  }
  static double middle_of(std::size_t bucket) {
    if (bucket < kSub) return static_cast<double>(bucket);
    const std::size_t octave = bucket / kSub;
    const double width = static_cast<double>(std::uint64_t{1} << (octave - 1));
    return (static_cast<double>(kSub + bucket % kSub) + 0.5) * width;
  }

  std::array<std::atomic<std::uint64_t>, kBuckets> buckets_{};
};

}  // namespace kvrouter
