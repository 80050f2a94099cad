#include "server/registry_api.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "server/json_body.h"

namespace kvrouter {
namespace {

using nlohmann::json;

std::string dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

ApiAnswer failure(unsigned status, const std::string& detail) {
  return {status, dump({{"detail", detail}})};
}

const char* name_of(Breaker::State state) {
  switch (state) {
    case Breaker::State::kClosed:
      return "closed";
    case Breaker::State::kOpen:
      return "open";
    case Breaker::State::kHalfOpen:
      return "half_open";
  }
  return "";
}

ApiAnswer list_workers(Router& router, const Fleet& fleet) {
  json answer = json::parse(answer_router_request(router, {"GET", "/workers", "", ""}).body);
  json workers = json::array();
  for (json& worker : answer["workers"]) {
    const FleetWorker& known = fleet.worker(worker["worker_id"].get<WorkerId>());
    if (!known.present) continue;
    json models = json::array();
    for (const ServedModel& model : known.models) models.push_back(model.id);
    worker["url"] = known.spec.url;
    worker["rank"] = known.rank ? json(*known.rank) : json();
    worker["replay_endpoint"] = known.spec.replay;
    worker["healthy"] = known.healthy;
    worker["health_error"] = known.health_error;
    worker["draining"] = known.draining;
    worker["breaker"] = name_of(known.breaker.state());
    worker["in_flight"] = known.in_flight;
    worker["requests"] = known.requests;
    worker["errors"] = known.errors;
    worker["models"] = std::move(models);
    worker["block_size"] = known.block_size;
    worker["prefix_cache_queries"] = known.cache_queries;
    worker["prefix_cache_hits"] = known.cache_hits;
    workers.push_back(std::move(worker));
  }
  answer["workers"] = std::move(workers);
  return {200, dump(answer)};
}

// The worker's own names of its blocks, as far as the router knows.
ApiAnswer list_blocks(Router& router, const Fleet& fleet, const HttpRequest& request, WorkerId worker) {
  if (request.method != "GET") return failure(405, "use GET");
  if (worker >= fleet.num_slots() || !fleet.worker(worker).present) {
    return failure(404, "there is no worker " + std::to_string(worker));
  }
  return {200, dump({{"worker_id", worker}, {"blocks", router.index().worker_blocks(worker)}})};
}

ApiAnswer add_worker(Fleet& fleet, const std::string& body) {
  const json message = parse_json(body);
  if (!message.is_object()) return failure(400, "the body must be a JSON object");
  WorkerSpec spec;
  for (const auto& [name, target] : {std::pair{"url", &spec.url}, std::pair{"kv_events", &spec.kv_events},
                                     std::pair{"replay", &spec.replay}, std::pair{"load", &spec.load}}) {
    const auto value = message.find(name);
    if (value == message.end() || value->is_null()) continue;
    if (!value->is_string()) return failure(400, std::string(name) + " must be a string");
    *target = value->get<std::string>();
  }
  if (spec.url.empty()) return failure(400, "url must be http://host:port or https://host:port");
  if (const auto size = message.find("data_parallel_size"); size != message.end() && !size->is_null()) {
    if (!size->is_number_unsigned() || size->get<std::uint64_t>() > kMaxDataParallelSize) {
      return failure(400, "data_parallel_size must be an integer from 0 to " + std::to_string(kMaxDataParallelSize));
    }
    spec.data_parallel_size = size->get<unsigned>();
  }
  const Fleet::Added added = fleet.add(spec);
  if (!added.error.empty()) return failure(fleet.find(spec.url) ? 409 : 400, added.error);
  return {201, dump({{"worker_id", added.workers.front()}, {"worker_ids", added.workers}, {"url", spec.url}})};
}

}  // namespace

ApiAnswer answer_registry_request(Router& router, Fleet& fleet, const HttpRequest& request) {
  std::string_view rest = std::string_view(request.path).substr(std::string_view("/workers").size());
  if (rest.empty() || rest == "/") {
    if (request.method == "GET") return list_workers(router, fleet);
    if (request.method == "POST") return add_worker(fleet, request.body);
    return failure(405, "use GET or POST");
  }
  rest.remove_prefix(1);
  WorkerId worker = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), worker);
  const std::string_view action(end, static_cast<std::size_t>(rest.data() + rest.size() - end));
  if (error != std::errc() || (!action.empty() && action != "/drain" && action != "/blocks")) {
    return failure(404, "there is no such thing");
  }
  if (action == "/blocks") return list_blocks(router, fleet, request, worker);
  const std::string missing = "there is no worker " + std::to_string(worker);
  if (action.empty()) {
    if (request.method != "DELETE") return failure(405, "use DELETE");
    if (!fleet.remove(worker)) return failure(404, missing);
    return {200, R"({"status":"ok"})"};
  }
  if (request.method != "POST") return failure(405, "use POST");
  bool draining = true;
  if (!request.body.empty()) {
    const json message = parse_json(request.body);
    if (!message.is_object() || !message.value("draining", json(true)).is_boolean()) {
      return failure(400, "the body must be {\"draining\": true or false}");
    }
    draining = message.value("draining", true);
  }
  if (!fleet.set_draining(worker, draining)) return failure(404, missing);
  return {200, R"({"status":"ok"})"};
}

}  // namespace kvrouter
