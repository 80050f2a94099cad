// The worker's /metrics page, in vLLM's names.
#pragma once

#include <cstdint>
#include <string>

#include "sim/block_pool.h"
#include "sim/scheduler.h"

namespace kvrouter::sim {

struct WorkerStats {
  double kv_usage = 0;
  std::int64_t waiting = 0;
  std::int64_t running = 0;
  SchedulerCounters counters;
};

// Prometheus text format 0.0.4.
std::string metrics_page(const WorkerStats& stats, const std::string& model, std::int32_t block_size,
                         std::int32_t num_blocks);
// The load message: a JSON object.
std::string load_message(const WorkerStats& stats);
// What /debug/blocks answers: {"batches": published so far, "blocks": [...], "told_removed": [...]}, see
// BlockPool::Held.
std::string held_blocks_json(const BlockPool::Held& held, std::uint64_t batches);

}  // namespace kvrouter::sim
