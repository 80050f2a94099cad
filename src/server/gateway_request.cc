#include "server/gateway_request.h"

#include "server/json_reader.h"

namespace kvrouter {
namespace {

namespace dom = simdjson::dom;

bool is_text(dom::array messages) {
  for (const dom::element message : messages) {
    dom::object fields;
    if (message.get(fields) != simdjson::SUCCESS) return false;
    const auto content = json_field(fields, "content");
    if (!content || content->is_string()) continue;
    dom::array parts;
    if (content->get(parts) != simdjson::SUCCESS) return false;
    for (const dom::element part : parts) {
      dom::object part_fields;
      if (part.get(part_fields) != simdjson::SUCCESS) return false;
      const auto type = json_field(part_fields, "type");
      std::string_view name;
      if (!type || type->get(name) != simdjson::SUCCESS || name != "text") return false;
    }
  }
  return true;
}

// An object of its own with those of the fields that the request has.
class TokenizeBody {
 public:
  explicit TokenizeBody(dom::object request) : request_(request) {}
  void add(std::string_view name) {
    if (const auto value = json_field(request_, name)) add(name, *value);
  }
  void add(std::string_view name, dom::element value) {
    text_.append(text_.empty() ? "{\"" : ",\"").append(name).append("\":").append(simdjson::minify(value));
  }
  std::string finish() && { return std::move(text_ += '}'); }

 private:
  dom::object request_;
  std::string text_;
};

void read_prompt(dom::object message, GatewayRequest& out) {
  TokenizeBody body(message);
  dom::array list;
  if (const auto messages = json_field(message, "messages"); messages && messages->get(list) == simdjson::SUCCESS) {
    if (!is_text(list)) return;
    for (const std::string_view name : {"add_generation_prompt", "add_special_tokens", "chat_template",
                                        "chat_template_kwargs", "continue_final_message", "model", "tools"}) {
      body.add(name);
    }
    body.add("messages", *messages);
    out.to_tokenize = std::move(body).finish();
    return;
  }
  auto prompt = json_field(message, "prompt");
  if (!prompt) return;
  if (prompt->get(list) == simdjson::SUCCESS && list.begin() != list.end()) {
    const dom::element first = *list.begin();
    if (!first.is_number()) prompt = first;
  }
  if (prompt->get(list) == simdjson::SUCCESS) {
    read_token_ids(list, out.tokens);  // if they are none, the worker will say so
  } else if (prompt->is_string()) {
    for (const std::string_view name : {"add_special_tokens", "model"}) body.add(name);
    body.add("prompt", *prompt);
    out.to_tokenize = std::move(body).finish();
  }
}

}  // namespace

std::string parse_gateway_request(const std::string& body, GatewayRequest& out) {
  dom::object message;
  if (std::string error = parse_json_object(body, "the body", message); !error.empty()) return error;
  if (const auto model = json_field(message, "model")) {
    std::string_view name;
    if (model->get(name) != simdjson::SUCCESS) return "model must be a string";
    out.model = name;
  }
  if (const auto stream = json_field(message, "stream")) {
    if (stream->get(out.stream) != simdjson::SUCCESS) return "stream must be true or false";
  }
  read_prompt(message, out);
  return {};
}

}  // namespace kvrouter
