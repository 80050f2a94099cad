// The router's own account of what it has sent where: requests in flight, and prefixes on their way.
//
// A decision by a policy that uses the account holds its lock from the look to the entry, a few microseconds, so that
// no two decisions send to the same gap.  A batch looks and enters under the lock, and decides without it.
#pragma once

#include <functional>
#include <mutex>
#include <span>

#include "kvrouter/policy.h"
#include "kvrouter/prefix_index.h"
#include "kvrouter/router.h"
#include "kvrouter/worker_load.h"
#include "router/in_flight.h"
#include "router/routed_prefixes.h"

namespace kvrouter {

class Account {
 public:
  Account(std::size_t num_workers, std::size_t block_size, std::function<double()> clock);

  // To be held around what follows, except the feedback.
  [[nodiscard]] std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

  // Fills the account's columns of the rows; expected_blocks too unless `prefixes` is empty.
  void describe(const LoadTable& loads, const PrefixIndex& index, std::span<const PrefixHash> prefixes,
                std::span<WorkerView> rows);
  // expected[w] becomes the number of leading prefixes on their way to worker w, where that is more.
  void raise(std::span<const PrefixHash> prefixes, std::span<std::uint32_t> expected);
  // The request goes to `worker`, where `expected_blocks` of its blocks will be found.
  Ticket enter(const RoutingRequest& request, WorkerId worker, std::uint32_t expected_blocks);
  // What the outputs of such a request are expected to have, where the caller gave no hint.
  double expected_output(std::span<const PrefixHash> prefixes) const;

  // Feedback, under a lock of its own accord.
  bool first_token(Ticket ticket);
  bool complete(Ticket ticket, const Completion& completion);
  AccountStatus status();
  // Caches were emptied: nothing is on its way any more.
  void forget_prefixes();

 private:
  double block_size_;
  std::function<double()> clock_;
  std::mutex mutex_;
  InFlight in_flight_;
  RoutedPrefixes routed_;
  std::size_t num_workers_;
  double generation_began_ = 0;
  // A cache is full when it no longer grows: blocks were computed, and yet its worker holds no more than before.
  struct CacheSize {
    std::size_t most_held = 0;
    double computed_since = 0;  // blocks sent to be computed since it was last larger than ever
  };
  std::vector<CacheSize> cache_sizes_;
  std::vector<std::uint32_t> expected_;  // scratch
};

}  // namespace kvrouter
