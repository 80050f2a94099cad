// Policies: given what is known of every worker, which one should serve a request?
//
// A policy is one file in src/policy and one line in its registry.  It sees a request and a row per worker, and
// nothing else: no sockets, no index, no clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/prefix_index.h"

namespace kvrouter {

struct RoutingRequest {
  std::size_t num_tokens;  // > 0
  std::size_t block_size;  // tokens
};

struct WorkerView {
  std::uint32_t overlap_blocks = 0;  // leading blocks of the request that the worker holds
  double kv_usage = 0;               // 0 to 1
  std::int64_t waiting = 0;          // requests
  bool available = true;             // false: lost; to be chosen only if all are
};

// A source of random bits that threads may share.  The same seed gives the same sequence of draws.
class Random {
 public:
  virtual ~Random() = default;
  virtual std::uint64_t next() = 0;
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string_view name() const = 0;
  // The chosen worker; `scores[w]` becomes what the policy thinks of worker w, the higher the better.
  // Safe to call from several threads at once.
  // REQUIRES: workers is not empty; some worker is available; scores.size() == workers.size().
  virtual WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                          std::span<double> scores) = 0;
};

// A policy by name; nullptr if there is none of that name.
std::unique_ptr<Policy> make_policy(std::string_view name);
// The names that make_policy() knows, sorted.
std::vector<std::string> policy_names();

}  // namespace kvrouter
