// What a worker says of itself: the models it serves, its block size and its prefix cache's counters.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "server/fleet.h"

namespace kvrouter {

// Of GET /v1/models; nothing if it is malformed.
std::optional<std::vector<ServedModel>> parse_models(std::string_view json);

struct WorkerCounters {
  std::size_t block_size = 0;                       // 0: not said
  std::uint64_t cache_queries = 0, cache_hits = 0;  // tokens; engines behind one page summed
};
// Of a vLLM worker's /metrics page; with `engine`, of the counters only those with that label.
WorkerCounters parse_worker_counters(std::string_view prometheus_text, std::optional<unsigned> engine = std::nullopt);

}  // namespace kvrouter
