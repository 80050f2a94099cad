#include "server/gateway.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "server/exchange.h"

namespace kvrouter {

Gateway::Gateway(boost::asio::io_context& io, Router& router, Fleet& fleet, Tokenizer& tokenizer, AccessLog& log,
                 GatewayOptions options)
    : io_(io), router_(router), fleet_(fleet), tokenizer_(tokenizer), log_(log), options_(options) {
  fleet_.on_change([this] { serve_queue(); });
}
Gateway::~Gateway() = default;

void Gateway::stop() {
  queue_.clear();
  const auto exchanges = std::move(exchanges_);
  exchanges_.clear();
  for (const auto& exchange : exchanges) exchange->abort();
}

void Gateway::handle(HttpRequest&& request, std::shared_ptr<HttpReply> reply, bool routed) {
  ++counters_.requests;
  auto exchange = std::make_shared<Exchange>(*this, std::move(request), std::move(reply));
  exchanges_.insert(exchange);
  exchange->start(routed);
}

void Gateway::serve_queue() {
  if (serving_queue_) return;  // an exchange that ends at once says so, too
  serving_queue_ = true;
  for (auto at = queue_.begin(); at != queue_.end();) {
    const auto exchange = (*at)->shared_from_this();
    ++at;  // the exchange takes itself out
    exchange->try_to_send();
  }
  serving_queue_ = false;
}

std::string Gateway::models_json() const {
  nlohmann::json list = nlohmann::json::array();
  std::set<std::string> seen;
  for (WorkerId w = 0; w < fleet_.num_slots(); ++w) {
    const FleetWorker& worker = fleet_.worker(w);
    if (!worker.present) continue;
    for (const ServedModel& model : worker.models) {
      if (!seen.insert(model.id).second) continue;
      list.push_back({{"id", model.id}, {"object", "model"}, {"created", 0}, {"owned_by", "vllm"}});
    }
  }
  return nlohmann::json{{"object", "list"}, {"data", list}}.dump(-1, ' ', false,
                                                                 nlohmann::json::error_handler_t::replace);
}

void Gateway::log_decision(const std::string& model, std::span<const LocalHash> blocks, const Decision& decision) {
  hot_prefixes_.record(blocks, decision);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  decisions_.push_front({std::chrono::duration<double>(now).count(), model.substr(0, 256), decision});
  if (decisions_.size() > kLoggedDecisions) decisions_.pop_back();
}

}  // namespace kvrouter
