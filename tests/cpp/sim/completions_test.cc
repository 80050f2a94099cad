#include "sim/completions.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace kvrouter::sim {
namespace {

using Json = nlohmann::json;

ApiError parse(std::string_view body, CompletionRequest& out) {
  return parse_completion(body, "sim", 1024, out);
}

CompletionRequest parsed(std::string_view body) {
  CompletionRequest request;
  const ApiError error = parse(body, request);
  EXPECT_EQ(error.status, 0U) << error.message;
  return request;
}

TEST(Completions, Prompt_InEachOfItsForms) {
  const std::vector<Token> expected{5, 6, 7};
  for (const char* body : {R"({"prompt": [5, 6, 7]})", R"({"prompt": [[5, 6, 7]]})", R"({"prompt": "w5 w6\n w7 "})",
                           R"({"prompt": ["w5 w6 w7"], "model": "sim"})"}) {
    EXPECT_EQ(parsed(body).prompt, expected) << body;
  }
}

TEST(Completions, Words_AreTheirNumber_OrAStableHash) {
  EXPECT_EQ(tokenize("w0 w1023", 1024), (std::vector<Token>{0, 1023}));
  const auto odd = tokenize("w1024 hello w hello w5x W5 w-1 w99999999999", 1024);
  EXPECT_EQ(odd[1], odd[3]);
  for (const Token token : odd) EXPECT_TRUE(token >= 3 && token < 1024);
  EXPECT_TRUE(tokenize(" \n", 1024).empty());
}

TEST(Completions, Fields_AndTheirDefaults) {
  const CompletionRequest plain = parsed(R"({"prompt": [1], "unknown": {"a": 1}, "seed": null})");
  EXPECT_EQ(plain.max_tokens, 16);
  EXPECT_EQ(plain.seed, 0U);
  EXPECT_FALSE(plain.stream || plain.include_usage || plain.return_token_ids);
  const CompletionRequest full = parsed(
      R"({"prompt": [1], "max_tokens": 3, "min_tokens": 3, "seed": 9, "stream": true, "temperature": 0.5, "n": 1,
          "stream_options": {"include_usage": true}, "return_token_ids": true, "ignore_eos": true})");
  EXPECT_EQ(full.max_tokens, 3);
  EXPECT_EQ(full.seed, 9U);
  EXPECT_TRUE(full.stream && full.include_usage && full.return_token_ids);
}

TEST(Completions, BadRequests_AreToldWhatIsWrong) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "JSON"},
      {"{", "JSON"},
      {"[]", "object"},
      {"\xff\xfe", "JSON"},
      {R"({})", "prompt is missing"},
      {R"({"prompt": []})", "empty"},
      {R"({"prompt": ""})", "empty"},
      {R"({"prompt": [[]]})", "empty"},
      {R"({"prompt": 5})", "list of token ids"},
      {R"({"prompt": {}})", "list of token ids"},
      {R"({"prompt": [1024]})", "from 0 to 1023"},
      {R"({"prompt": [-1]})", "from 0 to 1023"},
      {R"({"prompt": [1.5]})", "from 0 to 1023"},
      {R"({"prompt": [1, "w2"]})", "from 0 to 1023"},
      {R"({"prompt": [99999999999999999999]})", "from 0 to 1023"},
      {R"({"prompt": [[1], [2]]})", "several prompts"},
      {R"({"prompt": ["a", "b"]})", "several prompts"},
      {R"({"prompt": [1], "max_tokens": 0})", "max_tokens"},
      {R"({"prompt": [1], "max_tokens": 18446744073709551615})", "max_tokens"},
      {R"({"prompt": [1], "max_tokens": "5"})", "max_tokens"},
      {R"({"prompt": [1], "min_tokens": 99})", "min_tokens"},
      {R"({"prompt": [1], "n": 2})", "n must be 1"},
      {R"({"prompt": [1], "temperature": -1})", "temperature"},
      {R"({"prompt": [1], "stream": 1})", "stream"},
      {R"({"prompt": [1], "stream_options": {"include_usage": true}})", "stream_options"},
      {R"({"prompt": [1], "stream": true, "stream_options": 3})", "stream_options"},
      {R"({"prompt": [1], "model": 3})", "model"},
  };
  for (const auto& [body, reason] : cases) {
    CompletionRequest request;
    const ApiError error = parse(body, request);
    EXPECT_EQ(error.status, 400U) << body;
    EXPECT_NE(error.message.find(reason), std::string::npos) << body << ": " << error.message;
    EXPECT_EQ(Json::parse(error_json(error))["error"]["code"], 400);
  }
  CompletionRequest request;
  const ApiError missing = parse(R"({"prompt": [1], "model": "other \"one\""})", request);
  EXPECT_EQ(missing.status, 404U);
  EXPECT_EQ(Json::parse(error_json(missing))["error"]["message"], "The model `other \"one\"` does not exist.");
}

TEST(Completions, DeeplyNestedBody_IsRefused_NotFollowed) {
  CompletionRequest request;
  EXPECT_EQ(parse(R"({"prompt": )" + std::string(1'000'000, '['), request).status, 400U);
  EXPECT_EQ(parse(R"({"prompt": )" + std::string(200'000, '[') + std::string(200'000, ']') + "}", request).status,
            400U);
}

TEST(Completions, Answers_AreTheJsonThatVllmSends) {
  const CompletionInfo info{"cmpl-1", json_escaped("a \"model\""), 12};
  const std::vector<Token> output{7, 8}, prompt{1, 2, 3};
  const Json answer = Json::parse(completion_json(info, output, &prompt, {3, 2, 0}));
  EXPECT_EQ(answer["id"], "cmpl-1");
  EXPECT_EQ(answer["object"], "text_completion");
  EXPECT_EQ(answer["model"], "a \"model\"");
  const Json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], "w7 w8");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["token_ids"], Json(output));
  EXPECT_EQ(choice["prompt_token_ids"], Json(prompt));
  EXPECT_EQ(answer["usage"], Json::parse(R"({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                                            "prompt_tokens_details": {"cached_tokens": 0}})"));
  EXPECT_FALSE(Json::parse(completion_json(info, output, nullptr, {}))["choices"][0].contains("token_ids"));
}

TEST(Completions, StreamEvents_AreOneJsonEach) {
  const CompletionInfo info{"cmpl-1", "sim", 12};
  const auto json = [](const std::string& event) {
    EXPECT_EQ(event.substr(0, 6), "data: ");
    EXPECT_EQ(event.substr(event.size() - 2), "\n\n");
    return Json::parse(event.substr(6));
  };
  const std::vector<Token> prompt{1, 2};
  const Json first = json(token_event(info, 7, true, false, true, prompt))["choices"][0];
  EXPECT_EQ(first["text"], "w7");
  EXPECT_TRUE(first["finish_reason"].is_null());
  EXPECT_EQ(first["prompt_token_ids"], Json(prompt));
  const Json last = json(token_event(info, 8, false, true, false, {}))["choices"][0];
  EXPECT_EQ(last["text"], " w8");
  EXPECT_EQ(last["finish_reason"], "length");
  EXPECT_FALSE(last.contains("token_ids"));
  const Json usage = json(usage_event(info, {2, 2, 64}));
  EXPECT_TRUE(usage["choices"].empty());
  EXPECT_EQ(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 64);
}

}  // namespace
}  // namespace kvrouter::sim
