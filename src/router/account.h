// The router's own account of what it has sent where: requests in flight, and prefixes on their way.
//
// A decision by a policy that uses the account holds its lock from the look to the entry, a few microseconds, so that
// no two decisions send to the same gap.  A batch looks and enters under the lock, and decides without it.
#pragma once

#include <algorithm>
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
  // The same of a request that another replica has sent.  `kept`: see RoutedPrefixes::add_kept().
  Ticket enter_of_peer(const InFlight::Sent& sent, std::span<const PrefixHash> kept);
  // Tokens that such a request costs there: not even a prompt that is cached whole is free, its last token is computed.
  static std::size_t miss_tokens(const RoutingRequest& request, std::uint32_t expected_blocks) {
    const std::size_t hit = std::min(request.num_tokens, std::size_t{expected_blocks} * request.block_size);
    return std::max<std::size_t>(request.num_tokens - hit, 1);
  }
  static std::uint64_t name_of_prompt(const RoutingRequest& request) {
    return request.prefixes.empty() ? 0 : request.prefixes.back();
  }
  // What the outputs of such a request are expected to have, where the caller gave no hint.
  double expected_output(std::span<const PrefixHash> prefixes) const;

  // Feedback, under a lock of its own accord.
  bool first_token(Ticket ticket);
  bool complete(Ticket ticket, const Completion& completion);
  // Requests that are not to count any more.
  void drop(std::span<const Ticket> tickets);
  // Calls f(ticket, sent) for this replica's own requests in flight, see InFlight::for_each_own().  The number of slots
  // there are.
  template <typename F>
  std::size_t for_each_own(std::size_t begin, std::size_t end, F f) {
    const std::lock_guard guard(mutex_);
    in_flight_.for_each_own(begin, end, f);
    return in_flight_.num_slots();
  }
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
