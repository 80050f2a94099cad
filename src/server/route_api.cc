#include "server/route_api.h"

#include <nlohmann/json.hpp>

#include "server/decision_json.h"
#include "server/gateway_request.h"
#include "server/json_reader.h"

namespace kvrouter {
namespace {

using nlohmann::json;
namespace dom = simdjson::dom;

constexpr std::string_view kJson = "application/json";

void fail(HttpReply& reply, unsigned status, std::string_view reason) {
  reply.send(status, kJson, json{{"detail", reason}}.dump(-1, ' ', false, json::error_handler_t::replace));
}

// Empty on success, else what is wrong.
std::string read_tokens(dom::object request, std::vector<TokenId>& out) {
  const auto tokens = json_field(request, "tokens");
  dom::array list;
  if (!tokens || tokens->get(list) != simdjson::SUCCESS || list.begin() == list.end()) {
    return "tokens must be a list of token ids";
  }
  return read_token_ids(list, out) ? "" : "tokens must be integers from 0 to 2^32 - 1";
}

void route_batch(Router& router, dom::element requests, NamespaceHash ns, HttpReply& reply) {
  dom::array list;
  if (requests.get(list) != simdjson::SUCCESS) return fail(reply, 400, "requests must be a list of objects");
  std::vector<std::vector<TokenId>> tokens;
  for (const dom::element entry : list) {
    dom::object request;
    const std::string error =
        entry.get(request) == simdjson::SUCCESS ? read_tokens(request, tokens.emplace_back()) : "it must be an object";
    if (!error.empty()) return fail(reply, 400, "requests[" + std::to_string(tokens.size() - 1) + "]: " + error);
  }
  const std::vector<std::span<const TokenId>> spans(tokens.begin(), tokens.end());
  std::vector<Choice> choices(spans.size());
  router.choose_batch_for_tokens(spans, ns, choices);
  json answer = {{"worker_ids", json::array()}, {"overlap_blocks", json::array()}};
  for (const Choice& choice : choices) {
    answer["worker_ids"].push_back(choice.worker);
    answer["overlap_blocks"].push_back(choice.overlap_blocks);
  }
  reply.send(200, kJson, answer.dump());
}

void route(Router& router, const Fleet& fleet, std::span<const TokenId> tokens, NamespaceHash ns, HttpReply& reply) {
  json answer = decision_json(router.explain_for_tokens(tokens, ns), fleet);
  answer["url"] = fleet.worker(answer["worker_id"].get<WorkerId>()).spec.url;
  reply.send(200, kJson, answer.dump());
}

}  // namespace

void answer_route(Router& router, Fleet& fleet, Tokenizer& tokenizer, const HttpRequest& request,
                  std::shared_ptr<HttpReply> reply) {
  if (request.method != "POST") return fail(*reply, 405, "use POST");
  dom::object message;
  if (const std::string error = parse_json_object(request.body, "the body", message); !error.empty()) {
    return fail(*reply, 400, error);
  }
  NamespaceHash ns = 0;
  if (const auto lora = json_field(message, "lora_name")) {
    std::string_view name;
    if (lora->get(name) != simdjson::SUCCESS) return fail(*reply, 400, "lora_name must be a string");
    ns = lora_namespace(name);
  }
  if (const auto requests = json_field(message, "requests")) return route_batch(router, *requests, ns, *reply);
  if (json_field(message, "tokens")) {
    std::vector<TokenId> tokens;
    if (const std::string error = read_tokens(message, tokens); !error.empty()) return fail(*reply, 400, error);
    return route(router, fleet, tokens, ns, *reply);
  }
  GatewayRequest parsed;
  if (const std::string error = parse_gateway_request(request.body, parsed); !error.empty()) {
    return fail(*reply, 400, error);
  }
  if (parsed.to_tokenize.empty()) return fail(*reply, 400, "give tokens, prompt (a text), messages (text) or requests");
  if (ns == 0 && fleet.is_adapter(parsed.model)) ns = lora_namespace(parsed.model);
  tokenizer.tokenize(parsed.model, parsed.to_tokenize, [&router, &fleet, ns, reply](TokenIds ids) {
    if (!ids || ids->empty()) return fail(*reply, 422, "no worker could tell the tokens of this text: send tokens");
    route(router, fleet, *ids, ns, *reply);
  });
}

}  // namespace kvrouter
