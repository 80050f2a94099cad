// Bodies made to hurt: each is answered, and costs itself alone.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "server/gateway_request.h"
#include "server/json_body.h"
#include "server/registry_api.h"
#include "server/router_api.h"
#include "server/worker_details.h"

namespace kvrouter {
namespace {

// 'depth' values around each other, closed again.
std::string nested(std::size_t depth) {
  return std::string(depth, '[') + std::string(depth, ']');
}

constexpr std::size_t kBomb = 4'000'000;

class HostileBodies : public ::testing::Test {
 protected:
  static RouterOptions options() {
    RouterOptions options;
    options.block_size = 4;
    options.workers.resize(2);
    return options;
  }
  ApiAnswer post(const std::string& path, const std::string& body) {
    return answer_router_request(router_, {"POST", path, "", body});
  }
  Router router_{options()};
};

TEST(ParseJson, TakesWhatIsNestedAsDeepAsTheLimit_AndNoDeeper) {
  EXPECT_TRUE(parse_json(nested(kMaxJsonDepth)).is_array());
  EXPECT_TRUE(parse_json(nested(kMaxJsonDepth + 1)).is_discarded());
}

TEST(ParseJson, BracketsInTexts_AreNoDepth) {
  const std::string text = R"({"a": "\"[[\\", "b": ")" + std::string(1000, '{') + R"("})";
  EXPECT_EQ(parse_json(text)["b"].get<std::string>().size(), 1000u);
}

TEST(ParseJson, ManyValuesSideBySide_AreNoDepth) {
  std::string text = "[0";
  for (int i = 0; i < 1000; ++i) text += ",[]";
  EXPECT_EQ(parse_json(text + "]").size(), 1001u);
}

TEST_F(HostileBodies, DepthBomb_InWhatTheTokenizerIsAsked) {
  GatewayRequest request;
  const std::string bomb = nested(kBomb);
  for (const std::string& body :
       {R"({"messages": [], "tools": )" + bomb + "}", R"({"messages": [{"content": [{"type": )" + bomb + "}]}]}",
        R"({"messages": [], "chat_template_kwargs": {"k": )" + bomb + "}}"}) {
    EXPECT_NE(parse_gateway_request(body, request), "");
  }
}

TEST_F(HostileBodies, DepthBomb_InEveryBodyOfTheApi) {
  for (const char* path : {"/find_best_worker", "/find_best_workers", "/find_worker_round_robin", "/reset"}) {
    for (const std::string& bomb :
         {nested(kBomb), std::string(kBomb, '['), R"({"worker_id": )" + nested(kBomb) + "}"}) {
      EXPECT_EQ(post(path, bomb).status, 400u) << path;
    }
  }
}

TEST_F(HostileBodies, DepthBomb_AsAWorkersModels) {
  EXPECT_FALSE(parse_models(R"({"data": [{"id": )" + nested(kBomb) + "}]}"));
}

TEST_F(HostileBodies, InvalidUtf8_IsSaid) {
  EXPECT_EQ(post("/find_best_worker", "{\"local_hashes\": [], \"\xff\xc0\": 1}").status, 400u);
  // Also where it comes back in the reason.
  const ApiAnswer answer = answer_router_request(router_, {"GET", "/\xff\xed\xa0\x80", "", ""});
  EXPECT_EQ(answer.status, 404u);
  EXPECT_TRUE(nlohmann::json::accept(answer.body));
}

TEST_F(HostileBodies, NumbersAtTheirLimits) {
  const auto with = [](const std::string& hashes, const std::string& tokens) {
    return R"({"local_hashes": [)" + hashes + R"(], "num_tokens": )" + tokens + "}";
  };
  EXPECT_EQ(post("/find_best_worker", with("18446744073709551615", "18446744073709551615")).status, 200u);
  for (const char* number : {"-1", "18446744073709551616", "1e300", "1e999", "-9223372036854775808", "0.5", "NaN"}) {
    EXPECT_EQ(post("/find_best_worker", with(number, "1")).status, 400u) << number;
    EXPECT_EQ(post("/find_best_worker", with("1", number)).status, 400u) << number;
  }
  for (const char* number : {"-1", "2", "18446744073709551615", "4294967296", "1e300"}) {
    EXPECT_EQ(post("/reset", R"({"worker_id": )" + std::string(number) + "}").status, 400u) << number;
  }
}

TEST_F(HostileBodies, BatchOfRequestsWithTheMostTokens) {
  const std::string one = R"({"local_hashes": [1, 2], "num_tokens": 18446744073709551615})";
  std::string body = R"({"requests": [)" + one;
  for (int i = 0; i < 100; ++i) body += "," + one;
  EXPECT_EQ(post("/find_best_workers", body + "]}").status, 200u);
}

}  // namespace
}  // namespace kvrouter
