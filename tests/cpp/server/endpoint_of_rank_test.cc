#include <gtest/gtest.h>

#include <stdexcept>

#include "server/fleet.h"
#include "server/worker_details.h"

namespace kvrouter {
namespace {

TEST(EndpointOfRank, AddsTheRankToThePort) {
  EXPECT_EQ(endpoint_of_rank("tcp://h:5557", 0), "tcp://h:5557");
  EXPECT_EQ(endpoint_of_rank("tcp://h:5557", 3), "tcp://h:5560");
  EXPECT_EQ(endpoint_of_rank("tcp://[::1]:5557", 1), "tcp://[::1]:5558");
  EXPECT_EQ(endpoint_of_rank("inproc://x", 2), "inproc://x_dp2");
  EXPECT_EQ(endpoint_of_rank("", 2), "");
  for (const char* endpoint : {"tcp://h", "tcp://h:", "tcp://h:x", "tcp://h:65535", "tcp://h:0", "ipc:///tmp/x:1"}) {
    EXPECT_THROW(endpoint_of_rank(endpoint, 1), std::invalid_argument) << endpoint;
  }
}

TEST(ParseWorkerCounters, OfOneEngineOrOfAll) {
  constexpr const char* kPage =
      "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"m\"} 100.0\n"
      "vllm:prefix_cache_queries_total{engine=\"1\",model_name=\"m\"} 300.0\n"
      "vllm:prefix_cache_queries_total{model_name=\"m\",other_engine=\"1\",engine=\"10\"} 1000.0\n"
      "vllm:prefix_cache_hits_total{engine=\"1\",model_name=\"m\"} 30.0\n"
      "vllm:cache_config_info{block_size=\"64\",engine=\"0\"} 1.0\n";
  EXPECT_EQ(parse_worker_counters(kPage).cache_queries, 1400u);
  const WorkerCounters one = parse_worker_counters(kPage, 1);
  EXPECT_EQ(one.cache_queries, 300u);
  EXPECT_EQ(one.cache_hits, 30u);
  EXPECT_EQ(one.block_size, 64u);  // the server's, which one engine tells for all
  EXPECT_EQ(parse_worker_counters(kPage, 0).cache_hits, 0u);
}

}  // namespace
}  // namespace kvrouter
