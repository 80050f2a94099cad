#include "server/gateway_request.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "server/json_body.h"

namespace kvrouter {
namespace {

using nlohmann::json;

const json* field(const json& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

// False where an entry is no token id: the worker will say so.
bool read_tokens(const json& list, std::vector<TokenId>& out) {
  out.reserve(list.size());
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > std::numeric_limits<TokenId>::max()) {
      out.clear();
      return false;
    }
    out.push_back(static_cast<TokenId>(id.get<std::uint64_t>()));
  }
  return true;
}

bool is_text(const json& messages) {
  for (const json& message : messages) {
    if (!message.is_object()) return false;
    const json* content = field(message, "content");
    if (!content || content->is_string()) continue;
    if (!content->is_array()) return false;
    for (const json& part : *content) {
      if (!part.is_object() || part.value("type", json()) != json("text")) return false;
    }
  }
  return true;
}

std::string tokenize_body(const json& request, std::initializer_list<const char*> fields) {
  json body = json::object();
  for (const char* name : fields) {
    if (const json* value = field(request, name)) body[name] = *value;
  }
  return body.dump(-1, ' ', false, json::error_handler_t::replace);
}

void read_prompt(const json& message, GatewayRequest& out) {
  if (const json* messages = field(message, "messages"); messages && messages->is_array()) {
    if (!is_text(*messages)) return;
    out.to_tokenize = tokenize_body(message, {"model", "messages", "add_generation_prompt", "continue_final_message",
                                              "add_special_tokens", "chat_template", "chat_template_kwargs", "tools"});
    return;
  }
  const json* prompt = field(message, "prompt");
  if (prompt && prompt->is_array() && !prompt->empty() && !prompt->front().is_number()) prompt = &prompt->front();
  if (!prompt) return;
  if (prompt->is_array()) {
    read_tokens(*prompt, out.tokens);
  } else if (prompt->is_string()) {
    json request = {{"prompt", *prompt}};
    for (const char* name : {"model", "add_special_tokens"}) {
      if (const json* value = field(message, name)) request[name] = *value;
    }
    out.to_tokenize = request.dump(-1, ' ', false, json::error_handler_t::replace);
  }
}

}  // namespace

std::string parse_gateway_request(std::string_view body, GatewayRequest& out) {
  const json message = parse_json(body);
  if (message.is_discarded()) return kInvalidJson;
  if (!message.is_object()) return "the body must be a JSON object";
  if (const json* model = field(message, "model")) {
    if (!model->is_string()) return "model must be a string";
    out.model = model->get<std::string>();
  }
  if (const json* stream = field(message, "stream")) {
    if (!stream->is_boolean()) return "stream must be true or false";
    out.stream = stream->get<bool>();
  }
  read_prompt(message, out);
  return {};
}

}  // namespace kvrouter
