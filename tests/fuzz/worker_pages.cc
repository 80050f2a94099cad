// What a worker answers: its /metrics, as the load and as its counters, and its /v1/models.
#include "fuzz.h"
#include "kvrouter/worker_load.h"
#include "server/worker_details.h"

namespace kvrouter::fuzz {

void fuzz_one(std::string_view input) {
  const LoadOrError parsed = parse_load_metrics(input);
  if (parsed.ok()) {
    FUZZ_CHECK(parsed.load.kv_usage >= 0 && parsed.load.kv_usage <= 1);
    FUZZ_CHECK(parsed.load.waiting >= 0 && parsed.load.running >= 0);
  }
  parse_worker_counters(input);
  if (const auto models = parse_models(input)) FUZZ_CHECK(models->size() <= 4096);
}

}  // namespace kvrouter::fuzz
