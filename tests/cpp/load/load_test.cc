#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <condition_variable>
#include <mutex>

#include "kvrouter/worker_load.h"
#include "load/metrics_scraper.h"
#include "server/http_server.h"

namespace kvrouter {
namespace {

TEST(LoadMessage, Valid) {
  const LoadOrError result =
      parse_load_message(R"({"kv_cache_usage": 0.25, "num_waiting_reqs": 3, "num_running_reqs": 2, "later": []})");
  ASSERT_TRUE(result.ok()) << result.error;
  EXPECT_EQ(result.load, (WorkerLoad{0.25, 3, 2}));
  EXPECT_EQ(parse_load_message(R"({"kv_cache_usage": 1, "num_waiting_reqs": 0})").load, (WorkerLoad{1.0, 0, 0}));
}

TEST(LoadMessage, Invalid_SaysWhy) {
  for (const char* text :
       {"", "[]", "{", "{}", R"({"kv_cache_usage": 0.1})", R"({"num_waiting_reqs": 1})",
        R"({"kv_cache_usage": 1.1, "num_waiting_reqs": 1})", R"({"kv_cache_usage": -0.1, "num_waiting_reqs": 1})",
        R"({"kv_cache_usage": "0.1", "num_waiting_reqs": 1})", R"({"kv_cache_usage": 0.1, "num_waiting_reqs": -1})",
        R"({"kv_cache_usage": 0.1, "num_waiting_reqs": 1.5})", R"({"kv_cache_usage": 0.1, "num_waiting_reqs": 1e300})",
        R"({"kv_cache_usage": NaN, "num_waiting_reqs": 1})",
        R"({"kv_cache_usage": 0.1, "num_waiting_reqs": 1, "num_running_reqs": null})"}) {
    EXPECT_FALSE(parse_load_message(text).ok()) << text;
  }
  EXPECT_FALSE(parse_load_message(std::string(60'000, '[')).ok());
}

RC_GTEST_PROP(LoadMessage, ArbitraryText_NeverCrashes, (const std::string& text)) {
  parse_load_message(text);
  parse_load_metrics(text);
}

constexpr const char* kMetrics = R"(# HELP vllm:num_requests_waiting Number of requests waiting.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a } b"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:num_requests_running{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
)";

TEST(LoadMetrics, OfOneEngine) {
  const LoadOrError result = parse_load_metrics(kMetrics);
  ASSERT_TRUE(result.ok()) << result.error;
  EXPECT_EQ(result.load, (WorkerLoad{0.5, 2, 4}));
}

TEST(LoadMetrics, OfSeveralEngines_QueuesAddUpAndUsageIsTheMean) {
  const std::string second = "vllm:num_requests_waiting{engine=\"1\"} 1\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.1\n";
  EXPECT_EQ(parse_load_metrics(kMetrics + second).load, (WorkerLoad{0.3, 3, 4}));
}

TEST(LoadMetrics, Invalid_SaysWhy) {
  EXPECT_FALSE(parse_load_metrics("").ok());
  EXPECT_FALSE(parse_load_metrics("vllm:kv_cache_usage_perc 0.5\n").ok());
  EXPECT_FALSE(parse_load_metrics("vllm:kv_cache_usage_perc 7\nvllm:num_requests_waiting 0\n").ok());
  EXPECT_FALSE(parse_load_metrics("vllm:kv_cache_usage_perc nan\nvllm:num_requests_waiting 0\n").ok());
}

TEST(LoadTable, NewestWordCounts_AndReplacesPredictions) {
  LoadTable table(2);
  table.update(1, {0.5, 4, 1});
  table.add_waiting(1);
  table.add_waiting(1);
  EXPECT_EQ(table.get(1), (WorkerLoad{0.5, 6, 1}));
  table.update(1, {0.6, 1, 2});
  EXPECT_EQ(table.get(1), (WorkerLoad{0.6, 1, 2}));
  EXPECT_EQ(table.get(0), WorkerLoad{});
}

// Collects what a scraper reports until `count` reports are there.
class Reports {
 public:
  void add(const LoadOrError& result) {
    const std::lock_guard lock(mutex_);
    results_.push_back(result);
    arrived_.notify_all();
  }
  std::vector<LoadOrError> wait_for(std::size_t count) {
    std::unique_lock lock(mutex_);
    arrived_.wait_for(lock, std::chrono::seconds(10), [&] { return results_.size() >= count; });
    return results_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<LoadOrError> results_;
};

TEST(MetricsScraper, ReadsARealPageAgainAndAgain) {
  HttpServer server("127.0.0.1", 0, [](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    if (request.path == "/metrics") {
      reply->send(200, "text/plain", kMetrics);
    } else {
      reply->send(404, "text/plain", "");
    }
  });
  Reports reports;
  MetricsScraper scraper({{}, {"http://127.0.0.1:" + std::to_string(server.port()), {}}},
                         {.interval = std::chrono::milliseconds(5),
                          .wanted = [](WorkerId) { return true; },
                          .on_load =
                              [&](WorkerId worker, const LoadOrError& result) {
                                EXPECT_EQ(worker, 1u);
                                reports.add(result);
                              }});
  const auto results = reports.wait_for(3);
  ASSERT_GE(results.size(), 3u);
  for (const LoadOrError& result : results) EXPECT_EQ(result.load, (WorkerLoad{0.5, 2, 4})) << result.error;
}

TEST(MetricsScraper, NobodyThere_IsReported) {
  std::uint16_t free_port = 0;
  {
    HttpServer server("127.0.0.1", 0, [](HttpRequest&&, std::shared_ptr<HttpReply>) {});
    free_port = server.port();
  }
  Reports reports;
  MetricsScraper scraper({{"http://127.0.0.1:" + std::to_string(free_port), {}}},
                         {.interval = std::chrono::milliseconds(5),
                          .wanted = [](WorkerId) { return true; },
                          .on_load = [&](WorkerId, const LoadOrError& result) { reports.add(result); }});
  const auto results = reports.wait_for(2);
  ASSERT_GE(results.size(), 2u);
  EXPECT_FALSE(results[0].ok());
}

TEST(MetricsScraper, Url_IsChecked) {
  for (const char* url : {"http://h:1", "https://h:1", "http://[::1]:80", "http://h:1/", ""})
    EXPECT_NO_THROW(validate_worker_url(url));
  for (const char* url : {"h:1", "ftp://h:1", "http://h", "http://:1", "http://h:", "http://h:x", "http://h:1/path",
                          "http://h:0", "http://h:65536", "http://h:99999999999999999999", "http://h:+1",
                          "http://a b:1", "http://h\r\nX: y:1", "http://u@h:1"}) {
    EXPECT_THROW(validate_worker_url(url), std::invalid_argument) << url;
  }
}

}  // namespace
}  // namespace kvrouter
