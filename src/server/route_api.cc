#include "server/route_api.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "server/decision_json.h"
#include "server/gateway_request.h"
#include "server/json_body.h"

namespace kvrouter {
namespace {

using nlohmann::json;

constexpr std::string_view kJson = "application/json";

void fail(HttpReply& reply, unsigned status, std::string_view reason) {
  reply.send(status, kJson, json{{"detail", reason}}.dump(-1, ' ', false, json::error_handler_t::replace));
}

// Empty on success, else what is wrong.
std::string read_tokens(const json& request, std::vector<TokenId>& out) {
  const auto tokens = request.find("tokens");
  if (tokens == request.end() || !tokens->is_array() || tokens->empty()) return "tokens must be a list of token ids";
  out.reserve(tokens->size());
  for (const json& id : *tokens) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > std::numeric_limits<TokenId>::max()) {
      return "tokens must be integers from 0 to 2^32 - 1";
    }
    out.push_back(static_cast<TokenId>(id.get<std::uint64_t>()));
  }
  return {};
}

void route_batch(Router& router, const json& message, NamespaceHash ns, HttpReply& reply) {
  const json& requests = message["requests"];
  if (!requests.is_array()) return fail(reply, 400, "requests must be a list of objects");
  std::vector<std::vector<TokenId>> tokens(requests.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string error = requests[i].is_object() ? read_tokens(requests[i], tokens[i]) : "it must be an object";
    if (!error.empty()) return fail(reply, 400, "requests[" + std::to_string(i) + "]: " + error);
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
  const json message = parse_json(request.body);
  if (message.is_discarded()) return fail(*reply, 400, kInvalidJson);
  if (!message.is_object()) return fail(*reply, 400, "the body must be a JSON object");
  NamespaceHash ns = 0;
  if (const auto lora = message.find("lora_name"); lora != message.end() && !lora->is_null()) {
    if (!lora->is_string()) return fail(*reply, 400, "lora_name must be a string");
    ns = lora_namespace(lora->get<std::string>());
  }
  if (message.contains("requests")) return route_batch(router, message, ns, *reply);
  if (message.contains("tokens")) {
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
