#include "kvrouter/worker_load.h"

namespace kvrouter {

LoadTable::LoadTable(std::size_t num_workers)
    : num_workers_(num_workers), entries_(std::make_unique<Entry[]>(num_workers)) {}

void LoadTable::update(WorkerId worker, const WorkerLoad& load) {
  Entry& entry = entries_[worker];
  entry.kv_usage.store(load.kv_usage, std::memory_order_relaxed);
  entry.waiting.store(load.waiting, std::memory_order_relaxed);
  entry.running.store(load.running, std::memory_order_relaxed);
  entry.said_waiting.store(load.waiting, std::memory_order_relaxed);
  entry.times.fetch_add(1, std::memory_order_release);
}

void LoadTable::add_waiting(WorkerId worker) {
  entries_[worker].waiting.fetch_add(1, std::memory_order_relaxed);
}

WorkerLoad LoadTable::get(WorkerId worker) const {
  const Entry& entry = entries_[worker];
  return {entry.kv_usage.load(std::memory_order_relaxed), entry.waiting.load(std::memory_order_relaxed),
          entry.running.load(std::memory_order_relaxed)};
}

WorkerLoad LoadTable::said(WorkerId worker) const {
  const Entry& entry = entries_[worker];
  return {entry.kv_usage.load(std::memory_order_relaxed), entry.said_waiting.load(std::memory_order_relaxed),
          entry.running.load(std::memory_order_relaxed)};
}

std::uint64_t LoadTable::times_said(WorkerId worker) const {
  return entries_[worker].times.load(std::memory_order_acquire);
}

}  // namespace kvrouter
