#include "router/account.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvrouter {
namespace {

// How long a prefix that no event confirms counts as on its way: one to two of these.  Long against the queues of
// workers and the delay of events, short against a training step.
constexpr double kGenerationSeconds = 30;
// A cache counts as full when so many blocks, and this share of it, were computed without its becoming larger.
constexpr double kBlocksToTell = 64;
constexpr double kShareToTell = 0.02;
constexpr double kFull = 0.9;  // of the most it ever held

}  // namespace

Account::Account(std::size_t num_workers, std::size_t block_size, std::function<double()> clock)
    : block_size_(static_cast<double>(block_size)),
      clock_(std::move(clock)),
      in_flight_(num_workers),
      routed_(num_workers),
      num_workers_(num_workers),
      cache_sizes_(num_workers) {}

void Account::describe(const LoadTable& loads, const PrefixIndex& index, std::span<const PrefixHash> prefixes,
                       std::span<WorkerView> rows) {
  const double now = clock_();
  if (now - generation_began_ > kGenerationSeconds) {
    routed_.next_generation();
    generation_began_ = now;
  }
  for (WorkerId w = 0; w < rows.size(); ++w) {
    if (!rows[w].available) in_flight_.drop_all(w);
    const std::uint64_t times = loads.times_said(w);
    in_flight_.on_load(now, w, loads.said(w), times);
    rows[w].cached_blocks = index.held_blocks(w);
  }
  in_flight_.fill(now, rows);
  expected_.resize(rows.size());
  for (std::size_t w = 0; w < rows.size(); ++w) expected_[w] = rows[w].overlap_blocks;
  routed_.raise(prefixes, expected_);
  for (std::size_t w = 0; w < rows.size(); ++w) {
    rows[w].expected_blocks = expected_[w];
    CacheSize& size = cache_sizes_[w];
    const std::size_t held = rows[w].cached_blocks;
    if (held > size.most_held) size = {held, 0};
    const double most = static_cast<double>(size.most_held);
    rows[w].evicting =
        size.computed_since > kBlocksToTell + kShareToTell * most + rows[w].prefill_tokens / block_size_ &&
        static_cast<double>(held) >= kFull * most;
  }
}

void Account::raise(std::span<const PrefixHash> prefixes, std::span<std::uint32_t> expected) {
  routed_.raise(prefixes, expected);
}

Ticket Account::enter(const RoutingRequest& request, WorkerId worker, std::uint32_t expected_blocks) {
  routed_.add(request.prefixes, worker);
  cache_sizes_[worker].computed_since += static_cast<double>(request.prefixes.size()) - expected_blocks;
  return in_flight_.add(clock_(),
                        {worker, request.num_tokens, miss_tokens(request, expected_blocks), name_of_prompt(request)});
}

Ticket Account::enter_of_peer(const InFlight::Sent& sent, std::span<const PrefixHash> kept) {
  const std::lock_guard guard(mutex_);
  routed_.add_kept(kept, sent.worker);
  if (!sent.prefilled) {
    cache_sizes_[sent.worker].computed_since += std::floor(static_cast<double>(sent.miss_tokens) / block_size_);
  }
  return in_flight_.add(clock_(), sent);
}

void Account::drop(std::span<const Ticket> tickets) {
  const std::lock_guard guard(mutex_);
  in_flight_.drop(tickets);
}

double Account::expected_output(std::span<const PrefixHash> prefixes) const {
  return in_flight_.expected_output(prefixes.empty() ? 0 : prefixes.back());
}

bool Account::first_token(Ticket ticket) {
  const std::lock_guard guard(mutex_);
  return in_flight_.first_token(clock_(), ticket);
}

bool Account::complete(Ticket ticket, const Completion& completion) {
  const std::lock_guard guard(mutex_);
  return in_flight_.complete(clock_(), ticket, completion);
}

AccountStatus Account::status() {
  const std::lock_guard guard(mutex_);
  return {in_flight_.size(), in_flight_.dropped(), routed_.ended_early()};
}

void Account::forget_prefixes() {
  const std::lock_guard guard(mutex_);
  routed_.reset(num_workers_);
}

}  // namespace kvrouter
