// The gateway's parts that need no network.
#include <gtest/gtest.h>

#include "server/access.h"
#include "server/breaker.h"
#include "server/gateway_request.h"
#include "server/hot_prefixes.h"
#include "server/token_cache.h"
#include "server/worker_details.h"

namespace kvrouter {
namespace {

TEST(Breaker, OpensAfterFailuresInARow_AndAdmitsOneTrial) {
  Breaker breaker({2, std::chrono::milliseconds(100)});
  const auto now = Breaker::Clock::now();
  breaker.on_failure(now);
  breaker.on_success();
  breaker.on_failure(now);
  EXPECT_TRUE(breaker.may_send(now));
  breaker.on_failure(now);
  EXPECT_FALSE(breaker.may_send(now));
  const auto later = now + std::chrono::milliseconds(100);
  ASSERT_TRUE(breaker.may_send(later));
  breaker.on_sent();
  EXPECT_EQ(breaker.state(), Breaker::State::kHalfOpen);
  EXPECT_FALSE(breaker.may_send(later));
  breaker.on_failure(later);
  EXPECT_FALSE(breaker.may_send(later));
  const auto last = later + std::chrono::milliseconds(100);
  ASSERT_TRUE(breaker.may_send(last));
  breaker.on_sent();
  breaker.on_success();
  EXPECT_EQ(breaker.state(), Breaker::State::kClosed);
}

TEST(Breaker, ATrialWithoutAResult_IsTriedAgain) {
  Breaker breaker({1, std::chrono::milliseconds(0)});
  const auto now = Breaker::Clock::now();
  breaker.on_failure(now);
  breaker.on_sent();
  breaker.on_abandoned();
  EXPECT_TRUE(breaker.may_send(now));
}

TEST(TokenCache, ForgetsWhatWasUsedLongestAgo) {
  TokenCache cache(5, 100);
  const auto ids = [](std::size_t count) { return std::make_shared<const std::vector<TokenId>>(count, 7); };
  cache.insert("a", ids(2));
  cache.insert("b", ids(2));
  EXPECT_NE(cache.find("a"), nullptr);
  cache.insert("c", ids(3));
  EXPECT_NE(cache.find("a"), nullptr);
  EXPECT_EQ(cache.find("b"), nullptr);
  EXPECT_NE(cache.find("c"), nullptr);
  EXPECT_EQ(cache.size(), 5u);
  cache.insert("longer than all", ids(6));
  EXPECT_EQ(cache.size(), 5u);
  EXPECT_EQ(cache.hits(), 3u);
  EXPECT_EQ(cache.misses(), 1u);
}

TEST(TokenCache, ManyShortTexts_AreBoundedToo) {
  TokenCache cache(1'000'000, 3);
  for (int i = 0; i < 100; ++i) {
    cache.insert("text " + std::to_string(i), std::make_shared<const std::vector<TokenId>>(i % 2, 7));
  }
  EXPECT_EQ(cache.size(), 2u);
  EXPECT_EQ(cache.find("text 96"), nullptr);
  EXPECT_NE(cache.find("text 97"), nullptr);
}

TEST(GatewayRequest, PromptsOfEveryKind) {
  const auto parse = [](const std::string& body) {
    GatewayRequest request;
    EXPECT_EQ(parse_gateway_request(body, request), "") << body;
    return request;
  };
  EXPECT_EQ(parse(R"({"model": "m", "prompt": [1, 4294967295]})").tokens, (std::vector<TokenId>{1, 4294967295}));
  EXPECT_EQ(parse(R"({"prompt": [[1, 2], [3]]})").tokens, (std::vector<TokenId>{1, 2}));
  EXPECT_TRUE(parse(R"({"prompt": [1, -1]})").tokens.empty());
  EXPECT_TRUE(parse(R"({"prompt": [1, 4294967296]})").tokens.empty());
  EXPECT_EQ(parse(R"({"model": "m", "prompt": "hi", "stream": true})").to_tokenize, R"({"model":"m","prompt":"hi"})");
  EXPECT_EQ(parse(R"({"prompt": ["hi", "you"]})").to_tokenize, R"({"prompt":"hi"})");
  EXPECT_EQ(parse(R"({"prompt": "\u00e9\"\n", "add_special_tokens": false, "model": null})").to_tokenize,
            "{\"add_special_tokens\":false,\"prompt\":\"\u00e9\\\"\\n\"}");
  // Of a name that comes twice the last counts, as it does for the worker.
  EXPECT_EQ(parse(R"({"prompt": [1], "model": "a", "prompt": [2], "model": "b"})").tokens, (std::vector<TokenId>{2}));
  EXPECT_EQ(parse(R"({"model": "a", "model": "b"})").model, "b");
  EXPECT_NE(parse(R"({"messages": [{"role": "user", "content": "hi"}]})").to_tokenize, "");
  EXPECT_EQ(parse(R"({"messages": [{"content": [{"type": "image_url"}]}]})").to_tokenize, "");
  EXPECT_EQ(parse(R"({"messages": 1, "prompt": {}})").to_tokenize, "");
}

TEST(GatewayRequest, Nonsense_IsSaid) {
  GatewayRequest request;
  for (const char* body : {"", "{", "[]", "1", R"({"model": 1})", R"({"stream": 1})", "{\"model\": \"\xff\"}",
                           R"({"prompt": [1], "rest": [1,]})", R"({"prompt": [1]} {})"}) {
    EXPECT_NE(parse_gateway_request(body, request), "") << body;
  }
}

TEST(WorkerDetails, BlockSizeAndCounters) {
  const WorkerCounters counters = parse_worker_counters(
      "# HELP x\nvllm:prefix_cache_queries_total{engine=\"0\"} 1e+02\nvllm:prefix_cache_queries_total{engine=\"1\"} "
      "50\n"
      "vllm:prefix_cache_hits_total{engine=\"0\"} 25.0\r\nvllm:prefix_cache_hits_totally 9\n"
      "vllm:cache_config_info{mamba_block_size=\"8\",block_size=\"64\",engine=\"0\"} 1.0");
  EXPECT_EQ(counters.block_size, 64u);
  EXPECT_EQ(counters.cache_queries, 150u);
  EXPECT_EQ(counters.cache_hits, 25u);
  const WorkerCounters none =
      parse_worker_counters("vllm:prefix_cache_hits_total nan\nvllm:cache_config_info{block_size=\"");
  EXPECT_EQ(none.cache_hits, 0u);
  EXPECT_EQ(none.block_size, 0u);
}

TEST(WorkerDetails, ModelsAndAdapters) {
  const auto models =
      parse_models(R"({"data": [{"id": "base", "parent": null}, {"id": "lora", "parent": "base"}, 3]})");
  ASSERT_TRUE(models.has_value());
  ASSERT_EQ(models->size(), 2u);
  EXPECT_FALSE((*models)[0].adapter);
  EXPECT_TRUE((*models)[1].adapter);
  EXPECT_FALSE(parse_models("[]").has_value());
  EXPECT_FALSE(parse_models("{").has_value());
}

TEST(Access, ConstantTimeComparison_IsExact) {
  EXPECT_TRUE(equal_in_constant_time("abc", "abc"));
  for (const char* other : {"", "ab", "abcd", "abd", "abcabc"}) EXPECT_FALSE(equal_in_constant_time(other, "abc"));
  EXPECT_TRUE(equal_in_constant_time("", ""));
}

TEST(Access, WithoutTokens_AdminCallsAreForLoopback) {
  HttpHeaders none;
  EXPECT_EQ(check_access({"", "", true}, AccessLevel::kAdmin, none).status, 0u);
  EXPECT_EQ(check_access({"", "", false}, AccessLevel::kAdmin, none).status, 403u);
  EXPECT_EQ(check_access({"", "", false}, AccessLevel::kApi, none).status, 0u);
}

TEST(HotPrefixes, TheMostSharedComesFirst) {
  HotPrefixes hot;
  Decision decision;
  decision.overlap_blocks = {1, 5};
  for (LocalHash i = 0; i < 1000; ++i) {
    const std::vector<LocalHash> shared = {1, 2, 3, 4, 100 + i}, alone = {5000 + i};
    hot.record(shared, decision);
    hot.record(alone, decision);
  }
  const auto top = hot.hottest(2);
  ASSERT_EQ(top.size(), 2u);
  EXPECT_EQ(top[0].blocks, 4u);
  EXPECT_EQ(top[1].blocks, 1u);
  EXPECT_GE(top[0].requests, 1000u);
  EXPECT_EQ(top[0].holders, 1u);
  EXPECT_EQ(top[1].holders, 2u);
}

}  // namespace
}  // namespace kvrouter
