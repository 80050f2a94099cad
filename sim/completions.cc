#include "sim/completions.h"

#include <xxhash.h>

#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "sim/scheduler.h"

namespace kvrouter::sim {
namespace {

using Json = nlohmann::json;

ApiError bad(std::string message) {
  return {400, std::move(message)};
}

// The field, or null where it is absent or null.
const Json* field(const Json& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

ApiError read_bool(const Json& object, const char* name, bool& out) {
  const Json* value = field(object, name);
  if (!value) return {};
  if (!value->is_boolean()) return bad(std::string(name) + " must be true or false");
  out = value->get<bool>();
  return {};
}

ApiError read_integer(const Json& object, const char* name, std::optional<std::int64_t>& out) {
  const Json* value = field(object, name);
  if (!value) return {};
  if (!value->is_number_integer() || (value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX)) {
    return bad(std::string(name) + " must be an integer");
  }
  out = value->get<std::int64_t>();
  return {};
}

ApiError read_tokens(const Json& list, Token vocab_size, std::vector<Token>& out) {
  out.reserve(list.size());
  for (const Json& item : list) {
    if (!item.is_number_unsigned() || item.get<std::uint64_t>() >= vocab_size) {
      return bad("prompt must hold token ids from 0 to " + std::to_string(vocab_size - 1));
    }
    out.push_back(item.get<Token>());
  }
  return {};
}

ApiError read_prompt(const Json& object, Token vocab_size, std::vector<Token>& out) {
  const Json* prompt = field(object, "prompt");
  if (!prompt) return bad("prompt is missing");
  if (prompt->is_array() && prompt->size() == 1 && !prompt->front().is_number()) prompt = &prompt->front();
  if (prompt->is_string()) {
    out = tokenize(prompt->get_ref<const std::string&>(), vocab_size);
  } else if (!prompt->is_array()) {
    return bad("prompt must be a list of token ids or a text");
  } else if (!prompt->empty() && !prompt->front().is_number()) {
    return bad("several prompts in one request are not supported: send one");
  } else if (ApiError error = read_tokens(*prompt, vocab_size, out); error.status) {
    return error;
  }
  return out.empty() ? bad("the prompt is empty") : ApiError{};
}

ApiError read_stream_options(const Json& object, CompletionRequest& out) {
  const Json* options = field(object, "stream_options");
  if (!options) return {};
  if (!out.stream) return bad("stream_options are for stream: true only");
  if (!options->is_object()) return bad("stream_options must be an object");
  return read_bool(*options, "include_usage", out.include_usage);
}

ApiError read_sampling(const Json& object, CompletionRequest& out) {
  std::optional<std::int64_t> max_tokens, min_tokens, seed, n;
  for (const auto& [name, target] : {std::pair{"max_tokens", &max_tokens}, std::pair{"min_tokens", &min_tokens},
                                     std::pair{"seed", &seed}, std::pair{"n", &n}}) {
    if (ApiError error = read_integer(object, name, *target); error.status) return error;
  }
  out.max_tokens = max_tokens.value_or(out.max_tokens);
  out.seed = static_cast<std::uint64_t>(seed.value_or(0));
  if (out.max_tokens < 1) return bad("max_tokens must be at least 1, got " + std::to_string(out.max_tokens));
  if (min_tokens && (*min_tokens < 0 || *min_tokens > out.max_tokens)) {
    return bad("min_tokens must be from 0 to max_tokens, got " + std::to_string(*min_tokens));
  }
  if (n && *n != 1) return bad("n must be 1: send one request a sample");
  if (const Json* temperature = field(object, "temperature")) {
    if (!temperature->is_number() || !(temperature->get<double>() >= 0)) return bad("temperature must be at least 0");
  }
  return {};
}

void append_word(std::string& out, Token token, bool first) {
  if (!first) out += ' ';
  out += 'w';
  out += std::to_string(token);
}

void append_ids(std::string& out, std::span<const Token> ids) {
  out += '[';
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    out += std::to_string(ids[i]);
  }
  out += ']';
}

void append_head(std::string& out, const CompletionInfo& info) {
  out += "{\"id\":\"";
  out += info.id;
  out += "\",\"object\":\"text_completion\",\"created\":";
  out += std::to_string(info.created);
  out += ",\"model\":\"";
  out += info.model;
  out += "\",\"choices\":[";
}

void append_usage(std::string& out, const Usage& usage) {
  out += "\"usage\":{\"prompt_tokens\":";
  out += std::to_string(usage.prompt_tokens);
  out += ",\"total_tokens\":";
  out += std::to_string(usage.prompt_tokens + usage.completion_tokens);
  out += ",\"completion_tokens\":";
  out += std::to_string(usage.completion_tokens);
  out += ",\"prompt_tokens_details\":{\"cached_tokens\":";
  out += std::to_string(usage.cached_tokens);
  out += "}}";
}

}  // namespace

std::vector<Token> tokenize(std::string_view text, Token vocab_size) {
  constexpr std::string_view kSpace = " \t\r\n\f\v";
  std::vector<Token> tokens;
  for (std::size_t begin = text.find_first_not_of(kSpace); begin != std::string_view::npos;) {
    const std::size_t end = std::min(text.find_first_of(kSpace, begin), text.size());
    const std::string_view word = text.substr(begin, end - begin);
    Token token = 0;
    const auto [rest, error] = std::from_chars(word.data() + 1, word.data() + word.size(), token);
    const bool named = word.front() == 'w' && word.size() > 1 && error == std::errc() &&
                       rest == word.data() + word.size() && token < vocab_size;
    if (!named) {
      token = kFirstPlainToken +
              static_cast<Token>(XXH3_64bits(word.data(), word.size()) % (vocab_size - kFirstPlainToken));
    }
    tokens.push_back(token);
    begin = text.find_first_not_of(kSpace, end);
  }
  return tokens;
}

ApiError parse_completion(std::string_view body, const std::string& model, Token vocab_size, CompletionRequest& out) {
  const Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return bad("the body is not valid JSON");
  if (!json.is_object()) return bad("the body must be a JSON object");
  if (const Json* name = field(json, "model")) {
    if (!name->is_string()) return bad("model must be a string");
    if (name->get_ref<const std::string&>() != model) {
      return {404, "The model `" + name->get<std::string>() + "` does not exist."};
    }
  }
  for (const auto& [name, target] :
       {std::pair{"stream", &out.stream}, std::pair{"return_token_ids", &out.return_token_ids}}) {
    if (ApiError error = read_bool(json, name, *target); error.status) return error;
  }
  if (ApiError error = read_stream_options(json, out); error.status) return error;
  if (ApiError error = read_sampling(json, out); error.status) return error;
  return read_prompt(json, vocab_size, out.prompt);
}

TokenizeAnswer answer_tokenize(std::string_view body, Token vocab_size) {
  const Json request = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  const Json* prompt = request.is_object() ? field(request, "prompt") : nullptr;
  if (!prompt || !prompt->is_string()) return {400, error_json(bad("prompt must be a text"))};
  const std::vector<Token> tokens = tokenize(prompt->get_ref<const std::string&>(), vocab_size);
  std::string answer = "{\"count\":" + std::to_string(tokens.size()) + ",\"tokens\":";
  append_ids(answer, tokens);
  return {200, answer + "}"};
}

std::string json_escaped(std::string_view text) {
  std::string quoted = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  return quoted.substr(1, quoted.size() - 2);
}

std::string error_json(const ApiError& error) {
  const char* type = error.status == 404  ? "NotFoundError"
                     : error.status < 500 ? "BadRequestError"
                                          : "InternalServerError";
  return "{\"error\":{\"message\":\"" + json_escaped(error.message) + "\",\"type\":\"" + type +
         "\",\"param\":null,\"code\":" + std::to_string(error.status) + "}}";
}

std::string completion_json(const CompletionInfo& info, std::span<const Token> output, const std::vector<Token>* prompt,
                            const Usage& usage) {
  std::string out;
  out.reserve(512 + 12 * output.size() + (prompt ? 6 * prompt->size() : 0));
  append_head(out, info);
  out += "{\"index\":0,\"text\":\"";
  for (std::size_t i = 0; i < output.size(); ++i) append_word(out, output[i], i == 0);
  out += "\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null";
  if (prompt) {
    out += ",\"token_ids\":";
    append_ids(out, output);
    out += ",\"prompt_token_ids\":";
    append_ids(out, *prompt);
  }
  out += "}],";
  append_usage(out, usage);
  out += '}';
  return out;
}

std::string token_event(const CompletionInfo& info, Token token, bool first, bool last, bool return_token_ids,
                        std::span<const Token> prompt) {
  std::string out;
  out.reserve(256 + 6 * prompt.size());
  out += "data: ";
  append_head(out, info);
  out += "{\"index\":0,\"text\":\"";
  append_word(out, token, first);
  out += last ? "\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null"
              : "\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null";
  if (return_token_ids) {
    out += ",\"token_ids\":";
    append_ids(out, {&token, 1});
    if (!prompt.empty()) {
      out += ",\"prompt_token_ids\":";
      append_ids(out, prompt);
    }
  }
  out += "}]}\n\n";
  return out;
}

std::string usage_event(const CompletionInfo& info, const Usage& usage) {
  std::string out = "data: ";
  append_head(out, info);
  out += "],";
  append_usage(out, usage);
  out += "}\n\n";
  return out;
}

}  // namespace kvrouter::sim
