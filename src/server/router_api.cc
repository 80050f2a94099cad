#include "server/router_api.h"

#include <nlohmann/json.hpp>

namespace kvrouter {
namespace {

using nlohmann::json;

constexpr std::string_view kJson = "application/json";

ApiAnswer failure(unsigned status, const std::string& detail) {
  return {status, json{{"detail", detail}}.dump()};
}

struct Query {
  std::vector<LocalHash> hashes;
  std::uint64_t num_tokens = 0;
};

// These two: empty on success, else what is wrong.
std::string parse_object(const std::string& body, json& message) {
  message = json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (message.is_discarded()) return "the body is not valid JSON";
  return message.is_object() ? "" : "the body must be a JSON object";
}

std::string parse_query(const json& message, Query& query) {
  const auto hashes = message.find("local_hashes");
  if (hashes == message.end() || !hashes->is_array()) return "local_hashes must be a list of integers";
  query.hashes.reserve(hashes->size());
  for (const json& hash : *hashes) {
    if (!hash.is_number_unsigned()) return "local_hashes must be integers from 0 to 2^64 - 1";
    query.hashes.push_back(hash.get<LocalHash>());
  }
  const auto num_tokens = message.find("num_tokens");
  if (num_tokens == message.end() || !num_tokens->is_number_integer()) return "num_tokens must be an integer";
  if (!num_tokens->is_number_unsigned() || num_tokens->get<std::uint64_t>() == 0) return "num_tokens must be positive";
  query.num_tokens = num_tokens->get<std::uint64_t>();
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
          {"failed_replays", worker.failed_replays},
          {"load_messages", worker.load_messages},
          {"malformed_load_messages", worker.malformed_load_messages}};
}

json describe(const Router& router) {
  const RouterStatus status = router.status();
  json workers = json::array();
  for (WorkerId w = 0; w < status.workers.size(); ++w) workers.push_back(describe(w, status.workers[w]));
  return {
      {"block_size", router.block_size()},
      {"policy", router.policy()},
      {"decisions", status.decisions},
      {"fallbacks", status.fallbacks},
      {"decision_us", {{"p50", status.decision_p50_us}, {"p99", status.decision_p99_us}}},
      {"index", {{"blocks", status.index.blocks}, {"pairs", status.index.pairs}, {"orphans", status.index.orphans}}},
      {"workers", std::move(workers)}};
}

ApiAnswer route(Router& router, const std::string& body, bool round_robin) {
  json message;
  if (const std::string error = parse_object(body, message); !error.empty()) return failure(400, error);
  Query query;
  if (const std::string error = parse_query(message, query); !error.empty()) return failure(400, error);
  const Choice choice = round_robin ? Choice{router.round_robin(), 0} : router.choose(query.hashes, query.num_tokens);
  return {200, "{\"worker_id\":" + std::to_string(choice.worker) +
                   ",\"overlap_blocks\":" + std::to_string(choice.overlap_blocks) + "}"};
}

ApiAnswer route_batch(Router& router, const std::string& body) {
  json message;
  if (const std::string error = parse_object(body, message); !error.empty()) return failure(400, error);
  const auto requests = message.find("requests");
  if (requests == message.end() || !requests->is_array()) return failure(400, "requests must be a list of objects");
  std::vector<Query> queries(requests->size());
  std::vector<BatchRequest> batch;
  for (std::size_t i = 0; i < queries.size(); ++i) {
    const json& request = (*requests)[i];
    const std::string error = request.is_object() ? parse_query(request, queries[i]) : "it must be a JSON object";
    if (!error.empty()) return failure(400, "requests[" + std::to_string(i) + "]: " + error);
    batch.push_back({queries[i].hashes, queries[i].num_tokens});
  }
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
  json message = json::object();
  if (!body.empty()) {
    if (const std::string error = parse_object(body, message); !error.empty()) return failure(400, error);
  }
  std::optional<WorkerId> worker;
  if (const auto given = message.find("worker_id"); given != message.end() && !given->is_null()) {
    if (!given->is_number_unsigned() || given->get<std::uint64_t>() >= router.num_workers()) {
      return failure(400, "worker_id must be an integer below " + std::to_string(router.num_workers()));
    }
    worker = given->get<WorkerId>();
  }
  const auto until_cleared = message.find("until_cleared");
  if (until_cleared != message.end() && !until_cleared->is_boolean()) {
    return failure(400, "until_cleared must be true or false");
  }
  const bool fence = until_cleared != message.end() && until_cleared->get<bool>();
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
