#include "server/dashboard.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "server/decision_json.h"

namespace kvrouter {

std::string dashboard_json(const Router& router, const Fleet& fleet, const Gateway& gateway) {
  using nlohmann::json;
  const RouterStatus status = router.status();
  json workers = json::array();
  for (WorkerId w = 0; w < fleet.num_slots(); ++w) {
    const FleetWorker& worker = fleet.worker(w);
    const WorkerStatus& known = status.workers[w];
    if (!worker.present) continue;
    workers.push_back({{"worker_id", w},
                       {"url", worker.spec.url},
                       {"rank", worker.rank ? json(*worker.rank) : json()},
                       {"healthy", worker.healthy},
                       {"draining", worker.draining},
                       {"breaker_open", worker.breaker.state() != Breaker::State::kClosed},
                       {"kv_usage", known.load.kv_usage},
                       {"waiting", known.load.waiting},
                       {"running", known.load.running},
                       {"in_flight", worker.in_flight},
                       {"requests", worker.requests},
                       {"errors", worker.errors},
                       {"decisions", known.decisions},
                       {"cached_blocks", known.cached_blocks},
                       {"event_batches", known.events.batches},
                       {"gaps", known.gaps},
                       {"cache_queries", worker.cache_queries},
                       {"cache_hits", worker.cache_hits}});
  }
  json decisions = json::array();
  for (const LoggedDecision& logged : gateway.decisions()) {
    json entry = decision_json(logged.decision, fleet);
    entry["time"] = logged.unix_time;
    entry["model"] = logged.model;
    decisions.push_back(std::move(entry));
  }
  json hot = json::array();
  for (const HotPrefixes::Entry& entry : gateway.hot_prefixes().hottest(10)) {
    char name[17];
    std::snprintf(name, sizeof(name), "%016llx", static_cast<unsigned long long>(entry.prefix));
    hot.push_back(
        {{"prefix", name}, {"blocks", entry.blocks}, {"requests", entry.requests}, {"holders", entry.holders}});
  }
  const GatewayCounters& counts = gateway.counters();
  return json{{"policy", router.policy()},
              {"block_size", router.block_size()},
              {"decisions_total", status.decisions},
              {"decision_p50_us", status.decision_p50_us},
              {"decision_p99_us", status.decision_p99_us},
              {"index_blocks", status.index.blocks},
              {"index_pairs", status.index.pairs},
              {"requests", counts.requests},
              {"in_flight", gateway.in_flight()},
              {"queued", gateway.queued()},
              {"retries", counts.retries},
              {"client_gone", counts.client_gone},
              {"routed_tokens", counts.routed_tokens},
              {"predicted_hit_tokens", counts.predicted_hit_tokens},
              {"workers", std::move(workers)},
              {"hot_prefixes", std::move(hot)},
              {"decisions", std::move(decisions)}}
      .dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace kvrouter
