#include "measure.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>

namespace kvrouter::bench {
namespace {

// The cores this process was given, read before any thread is pinned.
const std::vector<int>& allowed_cores() {
  static const std::vector<int> cores = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::vector<int> found;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
      for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (CPU_ISSET(core, &set)) found.push_back(core);
      }
    }
    return found;
  }();
  return cores;
}

}  // namespace

std::uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

std::uint64_t resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (!file) return 0;
  unsigned long size = 0, resident = 0;
  const int read = std::fscanf(file, "%lu %lu", &size, &resident);
  std::fclose(file);
  return read == 2 ? resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)) : 0;
}

void warm_memory() {
  constexpr std::size_t kBytes = std::size_t{512} << 20;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  for (const int advice : {MADV_HUGEPAGE, MADV_NOHUGEPAGE}) {  // the system keeps them apart
    (void)madvise(memory, kBytes, advice);
    std::memset(memory, 1, kBytes);
    (void)madvise(memory, kBytes, MADV_DONTNEED);
  }
  munmap(memory, kBytes);
}

std::uint64_t growth(std::uint64_t before, std::uint64_t after) {
  return after > before ? after - before : 0;
}

void pin_to_core(std::size_t number) {
  const std::vector<int>& cores = allowed_cores();
  if (cores.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores[number % cores.size()], &set);
  sched_setaffinity(0, sizeof set, &set);
}

std::size_t usable_cores() {
  return std::max<std::size_t>(1, allowed_cores().size());
}

std::uint64_t percentile(std::vector<std::uint64_t>& values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(static_cast<double>(values.size() - 1) * q)];
}

void DurationHistogram::record(std::uint64_t ns) {
  ++buckets_[bucket_of(ns)];
  ++count_;
  total_ns_ += ns;
  max_ns_ = std::max(max_ns_, ns);
}

void DurationHistogram::add(const DurationHistogram& other) {
  for (std::size_t i = 0; i < kBuckets; ++i) buckets_[i] += other.buckets_[i];
  count_ += other.count_;
  total_ns_ += other.total_ns_;
  max_ns_ = std::max(max_ns_, other.max_ns_);
}

std::uint64_t DurationHistogram::percentile(double q) const {
  if (count_ == 0) return 0;
  const auto rank = static_cast<std::uint64_t>(static_cast<double>(count_ - 1) * q);
  std::uint64_t seen = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    seen += buckets_[i];
    if (seen > rank) return middle_of(i);
  }
  return max_ns_;
}

std::size_t DurationHistogram::bucket_of(std::uint64_t ns) {
  if (ns < kExact) return static_cast<std::size_t>(ns);
  const auto octave = static_cast<std::size_t>(std::bit_width(ns)) - 13;
  const std::size_t sub = static_cast<std::size_t>(ns >> (octave + 12 - kSubBits)) & ((1 << kSubBits) - 1);
  return std::min(kExact + (octave << kSubBits) + sub, kBuckets - 1);
}

std::uint64_t DurationHistogram::middle_of(std::size_t bucket) {
  if (bucket < kExact) return bucket;
  const std::size_t octave = (bucket - kExact) >> kSubBits;
  const std::uint64_t sub = (bucket - kExact) & ((1 << kSubBits) - 1);
  const std::uint64_t width = std::uint64_t{1} << (octave + 12 - kSubBits);
  return (std::uint64_t{1} << (octave + 12)) + sub * width + width / 2;
}

}  // namespace kvrouter::bench
