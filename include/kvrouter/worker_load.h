// How loaded each worker is: KV usage and queue depth, as the worker last said, plus what was sent to it since.
//
// Threads: every method of LoadTable may be called from any thread; readers never wait.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "kvrouter/prefix_index.h"

namespace kvrouter {

struct WorkerLoad {
  double kv_usage = 0;       // share of the KV cache held by running requests, 0 to 1
  std::int64_t waiting = 0;  // requests queued
  std::int64_t running = 0;  // requests in the batch; 0 if the worker does not say

  bool operator==(const WorkerLoad&) const = default;
};

// A parsed load, or what is wrong with the message.
struct LoadOrError {
  WorkerLoad load;
  std::string error;  // empty: load is valid

  bool ok() const { return error.empty(); }
};

// A load message: JSON with "kv_cache_usage" (number, 0 to 1) and "num_waiting_reqs" (integer >= 0), and optionally
// "num_running_reqs".  Other keys are ignored.
LoadOrError parse_load_message(std::string_view json);

// The same from the text of a vLLM worker's /metrics page.  Several engines behind one page: queues are summed, KV
// usage is the mean; with `engine`, only the samples with that label count (of a server with data-parallel ranks).
LoadOrError parse_load_metrics(std::string_view prometheus_text, std::optional<unsigned> engine = std::nullopt);

class LoadTable {
 public:
  explicit LoadTable(std::size_t num_workers);

  std::size_t num_workers() const { return num_workers_; }
  // What the worker says now.  The newest word counts: it replaces what add_waiting() added.
  void update(WorkerId worker, const WorkerLoad& load);
  // A request was sent to `worker`: it waits there until the worker's next word.
  void add_waiting(WorkerId worker);
  WorkerLoad get(WorkerId worker) const;
  // What the worker said last, without what add_waiting() added, and how often it has spoken.
  WorkerLoad said(WorkerId worker) const;
  std::uint64_t times_said(WorkerId worker) const;

 private:
  struct alignas(64) Entry {  // a cache line each: workers are written by turns and read all at once
    std::atomic<double> kv_usage{0};
    std::atomic<std::int64_t> waiting{0};
    std::atomic<std::int64_t> running{0};
    std::atomic<std::int64_t> said_waiting{0};
    std::atomic<std::uint64_t> times{0};
  };
  std::size_t num_workers_;
  std::unique_ptr<Entry[]> entries_;
};

}  // namespace kvrouter
