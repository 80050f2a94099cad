#include "server/service_metrics.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>

namespace kvrouter {
namespace {

std::string number(double value) {
  char text[40];
  const bool whole = std::abs(value) < 9e15 && value == std::floor(value);
  std::snprintf(text, sizeof(text), whole ? "%.0f" : "%.9g", value);
  return text;
}

double number_of(std::uint64_t value) {
  return static_cast<double>(value);
}

class Page {
 public:
  void family(std::string_view name, std::string_view type, std::string_view help) {
    text_.append("# HELP ").append(name).append(" ").append(help).append("\n# TYPE ").append(name).append(" ");
    text_.append(type).append("\n");
  }
  void sample(std::string_view name, const std::string& labels, double value) {
    text_.append(name);
    if (!labels.empty()) text_.append("{").append(labels).append("}");
    text_.append(" ").append(number(value)).append("\n");
  }
  void single(std::string_view name, std::string_view type, std::string_view help, double value) {
    family(name, type, help);
    sample(name, "", value);
  }
  void counter(std::string_view name, std::string_view help, std::uint64_t value) {
    single(name, "counter", help, number_of(value));
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\' || c == '"') out += '\\';
    c == '\n' ? out += "\\n" : out += c;
  }
  return out;
}

double resident_bytes() {
  std::ifstream file("/proc/self/statm");
  double total = 0, resident = 0;
  file >> total >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE));
}

void add_decisions(Page& page, const RouterStatus& status) {
  const std::string_view name = "kvrouter_decision_duration_seconds";
  page.family(name, "histogram", "Time of a routing decision.");
  const std::string bucket = std::string(name) + "_bucket";
  for (std::size_t i = 0; i < kDecisionBounds.size(); ++i) {
    page.sample(bucket, "le=\"" + number(kDecisionBounds[i]) + "\"", number_of(status.decision_counts[i]));
  }
  page.sample(bucket, "le=\"+Inf\"", number_of(status.decisions));
  page.sample(std::string(name) + "_sum", "", status.decision_seconds);
  page.sample(std::string(name) + "_count", "", number_of(status.decisions));
  page.counter("kvrouter_decision_fallbacks_total", "Decisions that failed and went round robin.", status.fallbacks);
}

void add_index(Page& page, const PrefixIndexStats& index) {
  page.single("kvrouter_index_blocks", "gauge", "Distinct KV blocks in the prefix index.", number_of(index.blocks));
  page.single("kvrouter_index_pairs", "gauge", "Pairs of worker and block in the prefix index.",
              number_of(index.pairs));
  page.single("kvrouter_index_orphans", "gauge", "Blocks whose parent is not known.", number_of(index.orphans));
  page.counter("kvrouter_index_contradictions_total", "Events that contradicted what a worker said before.",
               index.contradictions);
  page.single("kvrouter_index_memory_bytes", "gauge", "Memory in use by the prefix index.",
              number_of(index.memory_bytes));
  page.counter("kvrouter_index_given_up_blocks_total", "Blocks given up to stay below index_memory_limit.",
               index.given_up_blocks);
  page.counter("kvrouter_index_orphans_dropped_total", "Blocks of unknown place beyond the limit of orphans.",
               index.orphans_dropped);
}

void add_replicas(Page& page, const ReplicaStatus& replica) {
  page.single("kvrouter_replica_peers", "gauge", "Other replicas that are listened to.", number_of(replica.peers));
  page.single("kvrouter_replica_live_peers", "gauge", "Of these, heard of late.", number_of(replica.live));
  page.single("kvrouter_replica_requests", "gauge", "Requests in flight of other replicas.",
              number_of(replica.requests));
  page.counter("kvrouter_replica_sent_messages_total", "Messages to other replicas.", replica.sent);
  page.counter("kvrouter_replica_received_messages_total", "Messages of other replicas.", replica.received);
  page.counter("kvrouter_replica_missed_messages_total", "Messages of other replicas that were lost.", replica.missed);
  page.counter("kvrouter_replica_malformed_messages_total", "Messages that are none of a replica.", replica.malformed);
  page.counter("kvrouter_replica_ignored_events_total",
               "Of other replicas, about workers not known here or beyond the limit.", replica.ignored_events);
  page.counter("kvrouter_replica_dropped_events_total", "Not told to other replicas, as they were too many at a time.",
               replica.dropped_events);
  page.counter("kvrouter_replica_losses_total", "Times that another replica fell silent.", replica.losses);
}

void add_gateway(Page& page, const Gateway& gateway, const Tokenizer& tokenizer) {
  const GatewayCounters& counts = gateway.counters();
  page.family("kvrouter_responses_total", "counter", "Gateway requests done, by status (499: the client went away).");
  for (const auto& [status, count] : counts.by_status) {
    page.sample("kvrouter_responses_total", "status=\"" + std::to_string(status) + "\"", number_of(count));
  }
  page.single("kvrouter_requests_in_flight", "gauge", "Gateway requests not done.", number_of(gateway.in_flight()));
  page.single("kvrouter_requests_queued", "gauge", "Gateway requests that wait for a worker.",
              number_of(gateway.queued()));
  page.counter("kvrouter_requests_total", "Gateway requests begun.", counts.requests);
  page.counter("kvrouter_retries_total", "Requests sent to a second worker.", counts.retries);
  page.counter("kvrouter_rejected_total", "Requests refused as the queue was full (429).", counts.rejected_full);
  page.counter("kvrouter_queue_timeouts_total", "Requests that waited too long (503).", counts.queue_timeouts);
  page.counter("kvrouter_unavailable_total", "Requests for which no worker could be reached.", counts.unavailable);
  page.counter("kvrouter_client_disconnects_total", "Requests whose client went away.", counts.client_gone);
  page.counter("kvrouter_broken_streams_total", "Answers that their worker broke off.", counts.broken_streams);
  page.counter("kvrouter_routed_prompt_tokens_total", "Prompt tokens of routed requests.", counts.routed_tokens);
  page.counter("kvrouter_predicted_hit_tokens_total", "Of these, held by the chosen worker as far as the router knew.",
               counts.predicted_hit_tokens);
  page.counter("kvrouter_tokenizer_cache_hits_total", "Prompts whose tokens were known.", tokenizer.cache().hits());
  page.counter("kvrouter_tokenizer_cache_misses_total", "Prompts that a worker was asked to tokenize.",
               tokenizer.cache().misses());
  page.counter("kvrouter_tokenizer_failures_total", "Prompts whose tokens no worker told.", tokenizer.failures());
}

void add_workers(Page& page, const RouterStatus& status, const Fleet& fleet) {
  using Value = std::function<double(const FleetWorker&, const WorkerStatus&)>;
  const auto add = [&](const char* name, const char* type, const char* help, const Value& value) {
    page.family(name, type, help);
    for (WorkerId w = 0; w < fleet.num_slots(); ++w) {
      const FleetWorker& worker = fleet.worker(w);
      if (!worker.present) continue;
      std::string labels = "worker=\"" + std::to_string(w) + "\",url=\"" + escaped(worker.spec.url) + "\"";
      if (worker.rank) labels += ",rank=\"" + std::to_string(*worker.rank) + "\"";
      page.sample(name, labels, value(worker, status.workers[w]));
    }
  };
  using F = const FleetWorker&;
  using S = const WorkerStatus&;
  add("kvrouter_worker_healthy", "gauge", "1: its /health answers.", [](F f, S) { return f.healthy ? 1 : 0; });
  add("kvrouter_worker_draining", "gauge", "1: it gets nothing new.", [](F f, S) { return f.draining ? 1 : 0; });
  add("kvrouter_worker_breaker_open", "gauge", "1: it gets nothing for a while, after failures.",
      [](F f, S) { return f.breaker.state() == Breaker::State::kClosed ? 0 : 1; });
  add("kvrouter_worker_kv_usage_ratio", "gauge", "Share of its KV cache in use.",
      [](F, S s) { return s.load.kv_usage; });
  add("kvrouter_worker_waiting_requests", "gauge", "Requests in its queue.",
      [](F, S s) { return static_cast<double>(s.load.waiting); });
  add("kvrouter_worker_running_requests", "gauge", "Requests in its batch.",
      [](F, S s) { return static_cast<double>(s.load.running); });
  add("kvrouter_worker_requests_in_flight", "gauge", "Requests of this gateway that it has.",
      [](F f, S) { return number_of(f.in_flight); });
  add("kvrouter_worker_requests_total", "counter", "Requests sent to it by the gateway.",
      [](F f, S) { return number_of(f.requests); });
  add("kvrouter_worker_errors_total", "counter", "Of these, failed by it.", [](F f, S) { return number_of(f.errors); });
  add("kvrouter_worker_resyncs_total", "counter", "Replays that brought what is known of its cache up to date.",
      [](F, S s) { return number_of(s.resyncs); });
  add("kvrouter_worker_replayed_batches_total", "counter", "Batches of its KV events that a replay brought.",
      [](F, S s) { return number_of(s.replayed_batches); });
  add("kvrouter_worker_warm_starts_total", "counter", "Times that what a snapshot has of it was confirmed.",
      [](F, S s) { return number_of(s.warm_starts); });
  add("kvrouter_worker_decisions_total", "counter", "Decisions for it.", [](F, S s) { return number_of(s.decisions); });
  add("kvrouter_worker_cached_blocks", "gauge", "KV blocks that it is known to hold.",
      [](F, S s) { return number_of(s.cached_blocks); });
  add("kvrouter_worker_block_size_tokens", "gauge", "Tokens a block, as it says; 0: not known.",
      [](F f, S) { return number_of(f.block_size); });
  add("kvrouter_worker_kv_event_batches_total", "counter", "Batches of KV events received.",
      [](F, S s) { return number_of(s.events.batches); });
  add("kvrouter_worker_kv_blocks_stored_total", "counter", "Blocks that it said it stored.",
      [](F, S s) { return number_of(s.events.stored_blocks); });
  add("kvrouter_worker_kv_blocks_removed_total", "counter", "Blocks that it said it removed.",
      [](F, S s) { return number_of(s.events.removed_blocks); });
  add("kvrouter_worker_kv_event_gaps_total", "counter", "Gaps in its events.",
      [](F, S s) { return number_of(s.gaps); });
  add("kvrouter_worker_missed_kv_event_batches_total", "counter", "Batches of KV events that were lost in gaps.",
      [](F, S s) { return number_of(s.missed_batches); });
  add("kvrouter_worker_restarts_total", "counter", "Times its events began anew.",
      [](F, S s) { return number_of(s.restarts); });
  add("kvrouter_worker_routed_prompt_tokens_total", "counter", "Prompt tokens sent to it.",
      [](F f, S) { return number_of(f.routed_tokens); });
  add("kvrouter_worker_predicted_hit_tokens_total", "counter", "Of these, held by it as far as the router knew.",
      [](F f, S) { return number_of(f.predicted_hit_tokens); });
  add("kvrouter_worker_prefix_cache_queries_total", "counter", "Tokens looked up in its prefix cache, as it counts.",
      [](F f, S) { return number_of(f.cache_queries); });
  add("kvrouter_worker_hit_reports_total", "counter", "Requests of which it told how much it found in its cache.",
      [](F, S s) { return number_of(s.hits.reports); });
  add("kvrouter_worker_hit_missing_tokens_total", "counter", "Of these, tokens predicted and not found.",
      [](F, S s) { return number_of(s.hits.missing_tokens); });
  add("kvrouter_worker_hit_surplus_tokens_total", "counter", "Of these, tokens found and not predicted.",
      [](F, S s) { return number_of(s.hits.surplus_tokens); });
  add("kvrouter_worker_hits_diverge", "gauge", "1: it hits its cache otherwise than predicted; the log says why.",
      [](F, S s) { return s.hits.cause == HitCause::kNone ? 0 : 1; });
  add("kvrouter_worker_prefix_cache_hits_total", "counter", "Of these, found: the actual hits.",
      [](F f, S) { return number_of(f.cache_hits); });
}

}  // namespace

std::string service_metrics(const Router& router, const Fleet& fleet, const Gateway& gateway,
                            const Tokenizer& tokenizer) {
  const RouterStatus status = router.status();
  Page page;
  add_decisions(page, status);
  add_index(page, status.index);
  add_replicas(page, status.replica);
  add_gateway(page, gateway, tokenizer);
  add_workers(page, status, fleet);
  page.single("kvrouter_account_requests", "gauge", "Requests in flight by the router's own account.",
              number_of(status.account.requests));
  page.counter("kvrouter_account_dropped_requests_total", "Of these, taken for done as there were too many.",
               status.account.dropped_requests);
  page.counter("kvrouter_account_ended_early_total", "Times that prefixes on their way were too many to keep.",
               status.account.ended_early);
  page.counter("kvrouter_notices_dropped_total", "Log lines dropped as nobody read them in time.",
               status.notices_dropped);
  page.single("process_resident_memory_bytes", "gauge", "Resident memory.", resident_bytes());
  return page.take();
}

}  // namespace kvrouter
