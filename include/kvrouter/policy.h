// Policies: given what is known of every worker, which one should serve a request?
//
// A policy is one file in src/policy and one line in its registry.  It sees a request (or a batch of them) and a row
// per worker, and nothing else: no sockets, no index, no clock.
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

// A routed request, for feedback about it; 0: it is not tracked.
using Ticket = std::uint64_t;

// How a request ended, as far as its sender knows.
struct Completion {
  std::int64_t output_tokens = -1;  // -1: not known
  double first_token_s = 0;         // seconds from the decision to the first token; 0: not known
};

// Names a prefix: blocks 0 to k of a request, for its k-th prefix.
using PrefixHash = std::uint64_t;

struct RoutingRequest {
  std::size_t num_tokens;                  // > 0
  std::size_t block_size;                  // tokens
  std::span<const PrefixHash> prefixes{};  // one a full block; empty where the policy did not ask for them
  double expected_output = 0;              // tokens, as hinted by the caller or learnt; 0: nothing is known
};

// The names of the prefixes that end with each of these blocks.
// REQUIRES: out.size() == blocks.size().
void hash_prefixes(std::span<const LocalHash> blocks, std::span<PrefixHash> out);

struct WorkerView {
  std::uint32_t overlap_blocks = 0;  // leading blocks of the request that the worker holds, or is about to
  double kv_usage = 0;               // 0 to 1
  std::int64_t waiting = 0;          // requests
  bool available = true;             // false: lost; to be chosen only if all are

  // What follows is known to policies that use the router's own account (Policy::uses_account()).
  std::uint32_t expected_blocks = 0;  // overlap_blocks, or more: leading blocks sent there and not confirmed yet
  std::int64_t in_flight = 0;         // requests sent there and not known to be done
  double prefill_tokens = 0;          // of those requests, still to be computed
  double context_tokens = 0;          // of those requests: prompts
  double seconds_per_token = 0;       // of prefill there, learnt
  std::size_t cached_blocks = 0;      // KV blocks that the worker holds
  bool evicting = false;              // its cache is full: what it computes anew pushes something else out

  // Of equally good workers the one with the highest is taken; where it is the same, chance decides.
  std::uint64_t precedence = 0;
};

// A source of random bits that threads may share.  The same seed gives the same sequence of draws.
class Random {
 public:
  virtual ~Random() = default;
  virtual std::uint64_t next() = 0;
};

// Requests that are decided together, and the workers as each decision would leave them.
class Batch {
 public:
  virtual ~Batch() = default;
  virtual std::size_t size() const = 0;
  virtual RoutingRequest request(std::size_t i) const = 0;
  // A row a worker for request `i`, as if what is assigned so far had been sent: its prefixes count as held by the
  // worker it went to, and it waits there.  Valid, and the caller's to change, until the next call.
  virtual std::span<WorkerView> workers(std::size_t i) = 0;
  // Request `i` goes to `worker`.  Once for each request.
  virtual void assign(std::size_t i, WorkerId worker) = 0;
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string_view name() const = 0;
  // Whether the policy looks at prefixes and at the columns of the router's own account, which cost time to keep.
  virtual bool uses_account() const { return true; }
  // The chosen worker; `scores[w]` becomes what the policy thinks of worker w, the higher the better.
  // Safe to call from several threads at once.
  // REQUIRES: workers is not empty; some worker is available; scores.size() == workers.size().
  virtual WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                          std::span<double> scores) = 0;

  // Assigns every request of the batch.  Unless a policy knows better: one after the other, each decision seeing the
  // ones before it, and no worker above `batch_token_limit()` times the mean of tokens.
  // REQUIRES: as choose().
  virtual void choose_batch(Batch& batch, Random& random, std::span<double> scores);
  // Affinity alone would send a whole batch to whoever holds its prefix; this is where a group is split.  Infinite
  // for policies that follow no prefix.
  virtual double batch_token_limit() const { return 1.5; }
};

// A policy by name; nullptr if there is none of that name.
std::unique_ptr<Policy> make_policy(std::string_view name);
// The names that make_policy() knows, sorted.
std::vector<std::string> policy_names();

}  // namespace kvrouter
