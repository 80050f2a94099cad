#include "server/router_api.h"

#include <nlohmann/json.hpp>

#include "server/json_reader.h"

namespace kvrouter {
namespace {

using nlohmann::json;
namespace dom = simdjson::dom;

constexpr std::string_view kJson = "application/json";

ApiAnswer failure(unsigned status, const std::string& detail) {
  // It may repeat what the client sent, which need not be UTF-8.
  return {status, json{{"detail", detail}}.dump(-1, ' ', false, json::error_handler_t::replace)};
}

struct Query {
  std::vector<LocalHash> hashes;
  std::uint64_t num_tokens = 0;
};

// Empty on success, else what is wrong.
std::string read_query(dom::object message, Query& query) {
  const auto hashes = json_field(message, "local_hashes");
  dom::array list;
  if (!hashes || hashes->get(list) != simdjson::SUCCESS) return "local_hashes must be a list of integers";
  query.hashes.reserve(list.size());
  for (const dom::element entry : list) {
    LocalHash hash = 0;
    if (entry.get(hash) != simdjson::SUCCESS) return "local_hashes must be integers from 0 to 2^64 - 1";
    query.hashes.push_back(hash);
  }
  const auto num_tokens = json_field(message, "num_tokens");
  if (!num_tokens || !(num_tokens->is_int64() || num_tokens->is_uint64())) return "num_tokens must be an integer";
  if (num_tokens->get(query.num_tokens) != simdjson::SUCCESS || query.num_tokens == 0) {
    return "num_tokens must be positive";
  }
  return {};
}

std::string_view name_of(WorkerState state) {
  switch (state) {
    case WorkerState::kConnecting:
      return "connecting";
    case WorkerState::kUp:
      return "up";
    case WorkerState::kDown:
      return "down";
    case WorkerState::kSuspect:
      return "suspect";
  }
  return "";
}

std::string_view name_of(LoadSource source) {
  switch (source) {
    case LoadSource::kNone:
      return "none";
    case LoadSource::kMessages:
      return "messages";
    case LoadSource::kMetrics:
      return "metrics";
  }
  return "";
}

json describe(const HitCheckStatus& hits) {
  return {{"reports", hits.reports},
          {"prompt_tokens", hits.prompt_tokens},
          {"predicted_tokens", hits.predicted_tokens},
          {"cached_tokens", hits.cached_tokens},
          {"missing_tokens", hits.missing_tokens},
          {"surplus_tokens", hits.surplus_tokens},
          {"episodes", hits.episodes},
          {"cause", kvrouter::name_of(hits.cause)}};
}

std::string_view name_of(CacheKnowledge knowledge) {
  switch (knowledge) {
    case CacheKnowledge::kPartial:
      return "partial";
    case CacheKnowledge::kWhole:
      return "whole";
    case CacheKnowledge::kRecovering:
      return "recovering";
  }
  return "";
}

json describe(WorkerId id, const WorkerStatus& worker) {
  const KvEventCounts& events = worker.events;
  return {{"worker_id", id},
          {"kv_events_endpoint", worker.endpoints.kv_events},
          {"replay_endpoint", worker.endpoints.replay},
          {"load_endpoint", worker.endpoints.load},
          {"url", worker.endpoints.http},
          {"state", name_of(worker.state)},
          {"load_source", name_of(worker.load_source)},
          {"kv_usage", worker.load.kv_usage},
          {"waiting", worker.load.waiting},
          {"running", worker.load.running},
          {"cached_blocks", worker.cached_blocks},
          {"decisions", worker.decisions},
          {"events", events.batches},
          {"stored_blocks", events.stored_blocks},
          {"removed_blocks", events.removed_blocks},
          {"skipped_events", events.skipped_unknown_type + events.skipped_block_size + events.skipped_group +
                                 events.skipped_medium + events.skipped_invalid},
          {"malformed_batches", events.malformed_batches},
          {"gaps", worker.gaps},
          {"missed_batches", worker.missed_batches},
          {"restarts", worker.restarts},
          {"cache_knowledge", name_of(worker.knowledge)},
          {"resyncs", worker.resyncs},
          {"replayed_batches", worker.replayed_batches},
          {"warm_starts", worker.warm_starts},
          {"failed_replays", worker.failed_replays},
          {"load_messages", worker.load_messages},
          {"malformed_load_messages", worker.malformed_load_messages},
          {"hits", describe(worker.hits)}};
}

json describe(const Router& router) {
  const RouterStatus status = router.status();
  json workers = json::array();
  for (WorkerId w = 0; w < status.workers.size(); ++w) workers.push_back(describe(w, status.workers[w]));
  return {{"block_size", router.block_size()},
          {"policy", router.policy()},
          {"decisions", status.decisions},
          {"fallbacks", status.fallbacks},
          {"decision_us", {{"p50", status.decision_p50_us}, {"p99", status.decision_p99_us}}},
          {"index",
           {{"blocks", status.index.blocks},
            {"pairs", status.index.pairs},
            {"orphans", status.index.orphans},
            {"orphans_dropped", status.index.orphans_dropped},
            {"memory_bytes", status.index.memory_bytes},
            {"given_up_blocks", status.index.given_up_blocks}}},
          {"account",
           {{"requests", status.account.requests},
            {"dropped_requests", status.account.dropped_requests},
            {"ended_early", status.account.ended_early}}},
          {"replicas",
           {{"peers", status.replica.peers},
            {"live", status.replica.live},
            {"requests", status.replica.requests},
            {"sent", status.replica.sent},
            {"received", status.replica.received},
            {"missed", status.replica.missed},
            {"malformed", status.replica.malformed},
            {"ignored_events", status.replica.ignored_events},
            {"dropped_events", status.replica.dropped_events},
            {"losses", status.replica.losses}}},
          {"notices_dropped", status.notices_dropped},
          {"workers", std::move(workers)}};
}

ApiAnswer route(Router& router, const std::string& body, bool round_robin) {
  dom::object message;
  if (const std::string error = parse_json_object(body, "the body", message); !error.empty()) {
    return failure(400, error);
  }
  thread_local Query query;  // its memory is kept from one request to the next
  query.hashes.clear();
  if (const std::string error = read_query(message, query); !error.empty()) return failure(400, error);
  const Choice choice = round_robin ? Choice{router.round_robin(), 0} : router.choose(query.hashes, query.num_tokens);
  return {200, "{\"worker_id\":" + std::to_string(choice.worker) +
                   ",\"overlap_blocks\":" + std::to_string(choice.overlap_blocks) + "}"};
}

ApiAnswer route_batch(Router& router, const std::string& body) {
  dom::object message;
  if (const std::string error = parse_json_object(body, "the body", message); !error.empty()) {
    return failure(400, error);
  }
  const auto requests = json_field(message, "requests");
  dom::array list;
  if (!requests || requests->get(list) != simdjson::SUCCESS) return failure(400, "requests must be a list of objects");
  std::vector<Query> queries;
  for (const dom::element entry : list) {
    dom::object request;
    Query query;
    const std::string error =
        entry.get(request) == simdjson::SUCCESS ? read_query(request, query) : "it must be a JSON object";
    if (!error.empty()) return failure(400, "requests[" + std::to_string(queries.size()) + "]: " + error);
    queries.push_back(std::move(query));
  }
  std::vector<BatchRequest> batch;
  for (const Query& query : queries) batch.push_back({query.hashes, query.num_tokens});
  std::vector<Choice> choices(batch.size());
  router.choose_batch(batch, choices);
  json workers = json::array(), overlaps = json::array();
  for (const Choice& choice : choices) {
    workers.push_back(choice.worker);
    overlaps.push_back(choice.overlap_blocks);
  }
  return {200, json{{"worker_ids", std::move(workers)}, {"overlap_blocks", std::move(overlaps)}}.dump()};
}

ApiAnswer reset(Router& router, const std::string& body) {
  dom::object message;
  const std::string error = parse_json_object(body.empty() ? "{}" : body, "the body", message);
  if (!error.empty()) return failure(400, error);
  std::optional<WorkerId> worker;
  if (const auto given = json_field(message, "worker_id")) {
    std::uint64_t id = 0;
    if (given->get(id) != simdjson::SUCCESS || id >= router.num_workers()) {
      return failure(400, "worker_id must be an integer below " + std::to_string(router.num_workers()));
    }
    worker = static_cast<WorkerId>(id);
  }
  bool fence = false;
  if (const auto until_cleared = json_field(message, "until_cleared");
      until_cleared && until_cleared->get(fence) != simdjson::SUCCESS) {
    return failure(400, "until_cleared must be true or false");
  }
  router.reset(worker, fence ? Router::Reset::kUntilCleared : Router::Reset::kNow);
  return {200, R"({"status":"ok"})"};
}

}  // namespace

ApiAnswer answer_router_request(Router& router, const HttpRequest& request) {
  const bool get = request.method == "GET";
  const bool post = request.method == "POST";
  if (request.path == "/find_best_worker") {
    return post ? route(router, request.body, false) : failure(405, "use POST");
  }
  if (request.path == "/find_worker_round_robin") {
    return post ? route(router, request.body, true) : failure(405, "use POST");
  }
  if (request.path == "/find_best_workers") {
    return post ? route_batch(router, request.body) : failure(405, "use POST");
  }
  if (request.path == "/reset") {
    return post ? reset(router, request.body) : failure(405, "use POST");
  }
  if (request.path == "/workers") return get ? ApiAnswer{200, describe(router).dump()} : failure(405, "use GET");
  if (request.path == "/health") return get ? ApiAnswer{200, R"({"status":"ok"})"} : failure(405, "use GET");
  return failure(404, "there is no " + request.path);
}

RouterApiServer::RouterApiServer(Router& router, const std::string& host, std::uint16_t port)
    : server_(host, port, [&router](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
        ApiAnswer answer = answer_router_request(router, request);
        reply->send(answer.status, kJson, std::move(answer.body));
      }) {}

}  // namespace kvrouter
