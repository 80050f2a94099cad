#include "server/router_api.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/raw_client.h"

namespace kvrouter {
namespace {

using nlohmann::json;

class RouterApiTest : public ::testing::Test {
 protected:
  RouterApiTest() : router_(options()) {}

  static RouterOptions options() {
    RouterOptions options;
    options.workers.resize(2);
    return options;
  }
  ApiAnswer ask(const std::string& method, const std::string& path, const std::string& body = "") {
    return answer_router_request(router_, {method, path, "", body});
  }

  Router router_;
};

TEST_F(RouterApiTest, FindBestWorker) {
  router_.index().store(1, std::nullopt, std::vector<StoredBlock>{{7, 1}, {UINT64_MAX, 2}});
  const ApiAnswer answer =
      ask("POST", "/find_best_worker", R"({"local_hashes": [7, 18446744073709551615], "num_tokens": 130, "x": 1})");
  EXPECT_EQ(answer.status, 200u);
  EXPECT_EQ(json::parse(answer.body), (json{{"worker_id", 1}, {"overlap_blocks", 2}}));
  EXPECT_EQ(ask("POST", "/find_best_worker", R"({"local_hashes": [], "num_tokens": 1})").status, 200u);
}

TEST_F(RouterApiTest, RoundRobin) {
  for (int i = 0; i < 4; ++i) {
    const ApiAnswer answer = ask("POST", "/find_worker_round_robin", R"({"local_hashes": [1], "num_tokens": 64})");
    EXPECT_EQ(json::parse(answer.body).at("worker_id"), i % 2);
  }
}

TEST_F(RouterApiTest, BadInput_Is400WithAReason) {
  for (const char* path : {"/find_best_worker", "/find_worker_round_robin"}) {
    for (const char* body :
         {"", "{", "[]", "{}", R"({"local_hashes": [1]})", R"({"num_tokens": 1})",
          R"({"local_hashes": 1, "num_tokens": 1})", R"({"local_hashes": [-1], "num_tokens": 1})",
          R"({"local_hashes": ["1"], "num_tokens": 1})", R"({"local_hashes": [1.5], "num_tokens": 1})",
          R"({"local_hashes": [18446744073709551616], "num_tokens": 1})", R"({"local_hashes": [], "num_tokens": 0})",
          R"({"local_hashes": [], "num_tokens": -5})", R"({"local_hashes": [], "num_tokens": "5"})",
          "{\"local_hashes\": [], \"num_tokens\": 1, \"\xff\": 1}"}) {
      const ApiAnswer answer = ask("POST", path, body);
      EXPECT_EQ(answer.status, 400u) << body;
      EXPECT_FALSE(json::parse(answer.body).at("detail").get<std::string>().empty());
    }
  }
  EXPECT_EQ(router_.status().decisions, 0u);
}

TEST_F(RouterApiTest, Batch_IsDecidedTogether) {
  router_.index().store(1, std::nullopt, std::vector<StoredBlock>{{7, 1}});
  const ApiAnswer answer = ask("POST", "/find_best_workers",
                               R"({"requests": [{"local_hashes": [7], "num_tokens": 64},
                                                {"local_hashes": [9], "num_tokens": 65},
                                                {"local_hashes": [9], "num_tokens": 65}]})");
  ASSERT_EQ(answer.status, 200u);
  const json body = json::parse(answer.body);
  EXPECT_EQ(body.at("worker_ids").at(0), 1);
  EXPECT_EQ(body.at("worker_ids").size(), 3u);
  EXPECT_EQ(body.at("overlap_blocks").at(0), 1);
  EXPECT_EQ(json::parse(ask("POST", "/find_best_workers", R"({"requests": []})").body),
            (json{{"worker_ids", json::array()}, {"overlap_blocks", json::array()}}));
}

TEST_F(RouterApiTest, BadBatch_Is400WithTheRequestAtFault) {
  for (const char* body : {"", "[]", "{}", R"({"requests": 1})"}) {
    EXPECT_EQ(ask("POST", "/find_best_workers", body).status, 400u) << body;
  }
  const ApiAnswer answer = ask("POST", "/find_best_workers",
                               R"({"requests": [{"local_hashes": [], "num_tokens": 1}, {"local_hashes": []}]})");
  EXPECT_EQ(answer.status, 400u);
  EXPECT_NE(answer.body.find("requests[1]"), std::string::npos);
  EXPECT_EQ(router_.status().decisions, 0u);
}

TEST_F(RouterApiTest, OtherPathsAndMethods) {
  EXPECT_EQ(ask("GET", "/nowhere").status, 404u);
  EXPECT_EQ(ask("GET", "/find_best_worker").status, 405u);
  EXPECT_EQ(ask("GET", "/reset").status, 405u);
  EXPECT_EQ(ask("POST", "/workers").status, 405u);
  EXPECT_EQ(ask("GET", "/health").status, 200u);
}

TEST_F(RouterApiTest, ResetAndWorkers) {
  router_.index().store(0, std::nullopt, std::vector<StoredBlock>{{7, 1}});
  router_.loads().update(0, {0.5, 3, 2});
  json workers = json::parse(ask("GET", "/workers").body);
  EXPECT_EQ(workers.at("block_size"), 64);
  EXPECT_EQ(workers.at("workers").size(), 2u);
  EXPECT_EQ(workers["workers"][0].at("cached_blocks"), 1);
  EXPECT_EQ(workers["workers"][0].at("kv_usage"), 0.5);
  EXPECT_EQ(workers["workers"][0].at("waiting"), 3);
  EXPECT_EQ(ask("POST", "/reset", R"({"worker_id": 2})").status, 400u);
  EXPECT_EQ(ask("POST", "/reset", R"({"worker_id": "0"})").status, 400u);
  EXPECT_EQ(ask("POST", "/reset", R"({"until_cleared": 1})").status, 400u);
  EXPECT_EQ(ask("POST", "/reset", "[").status, 400u);
  EXPECT_EQ(ask("POST", "/reset", R"({"worker_id": 1, "until_cleared": true})").status, 200u);
  workers = json::parse(ask("GET", "/workers").body);
  EXPECT_EQ(workers["workers"][0].at("cached_blocks"), 1);
  EXPECT_EQ(ask("POST", "/reset").status, 200u);
  workers = json::parse(ask("GET", "/workers").body);
  EXPECT_EQ(workers["workers"][0].at("cached_blocks"), 0);
}

TEST_F(RouterApiTest, OverASocket) {
  RouterApiServer server(router_, "127.0.0.1", 0);
  testing::RawClient client(server.port());
  const std::string body = R"({"local_hashes": [1, 2], "num_tokens": 128})";
  client.send("POST /find_best_worker HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: " +
              std::to_string(body.size()) + "\r\n\r\n" + body);
  const std::string answer = client.read_to_end();
  EXPECT_NE(answer.find("200"), std::string::npos) << answer;
  EXPECT_NE(answer.find("worker_id"), std::string::npos) << answer;
}

}  // namespace
}  // namespace kvrouter
