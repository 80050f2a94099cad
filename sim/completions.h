// The OpenAI completions API as far as the simulated worker speaks it: requests from JSON, answers to JSON.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/kv_events.h"

namespace kvrouter::sim {

struct CompletionRequest {
  std::vector<Token> prompt;
  std::int64_t max_tokens = 16;
  std::uint64_t seed = 0;
  bool stream = false;
  bool include_usage = false;     // of a stream: a last chunk with the usage
  bool return_token_ids = false;  // in the answer, beside the text
};

struct ApiError {
  unsigned status = 0;  // 0: no error
  std::string message;
};

// Reads the body of POST /v1/completions.  A prompt is a list of token ids below vocab_size, or a text whose words are
// its tokens (see tokenize()), or a list of one such.  Fields that are not known are ignored.
ApiError parse_completion(std::string_view body, const std::string& model, Token vocab_size, CompletionRequest& out);

// The words of the text as token ids: "w123" is 123 where the vocabulary has it, any other word a hash of itself.
std::vector<Token> tokenize(std::string_view text, Token vocab_size);

// The answer to POST /tokenize with {"prompt": text}: {"count", "tokens"}.
struct TokenizeAnswer {
  unsigned status = 200;
  std::string body;
};
TokenizeAnswer answer_tokenize(std::string_view body, Token vocab_size);

// What an answer says of its request.
struct CompletionInfo {
  std::string id;     // "cmpl-..."
  std::string model;  // escaped for JSON
  std::int64_t created = 0;
};

struct Usage {
  std::int64_t prompt_tokens = 0;
  std::int64_t completion_tokens = 0;
  std::int64_t cached_tokens = 0;
};

std::string json_escaped(std::string_view text);
std::string error_json(const ApiError& error);
// The whole answer.  prompt: to be returned beside the output's ids; null to return no ids.
std::string completion_json(const CompletionInfo& info, std::span<const Token> output, const std::vector<Token>* prompt,
                            const Usage& usage);
// One event of a stream, "data: ...\n\n": one token.  prompt: of the first event, when ids are to be returned.
std::string token_event(const CompletionInfo& info, Token token, bool first, bool last, bool return_token_ids,
                        std::span<const Token> prompt);
std::string usage_event(const CompletionInfo& info, const Usage& usage);
inline constexpr std::string_view kStreamEnd = "data: [DONE]\n\n";

}  // namespace kvrouter::sim
