#include "router/replica_host.h"

#include <xxhash.h>

namespace kvrouter {

RouterReplicaHost::RouterReplicaHost(const std::vector<WorkerEndpoints>& workers, Account* account, LoadTable& loads,
                                     Notices& notices)
    : account_(account), loads_(loads), notices_(notices), names_(workers.size()), identities_(workers.size()) {
  for (WorkerId w = 0; w < workers.size(); ++w) set_worker(w, workers[w]);
}

void RouterReplicaHost::set_worker(WorkerId worker, const WorkerEndpoints& endpoints) {
  const std::lock_guard lock(mutex_);
  std::string& identity = identities_[worker];
  if (const auto old = workers_.find(identity); old != workers_.end() && old->second == worker) workers_.erase(old);
  identity = identity_of(endpoints);
  names_[worker].store(XXH3_64bits(identity.data(), identity.size()), std::memory_order_relaxed);
  if (!identity.empty()) workers_[identity] = worker;
}

void RouterReplicaHost::set_precedence(std::span<const LocalHash> blocks, std::span<WorkerView> views) const {
  if (blocks.empty()) return;
  const std::uint64_t prompt = XXH3_64bits(blocks.data(), blocks.size_bytes());
  for (WorkerId w = 0; w < views.size(); ++w) {
    const std::uint64_t name = names_[w].load(std::memory_order_relaxed);
    views[w].precedence = XXH3_64bits_withSeed(&name, sizeof name, prompt);
  }
}

std::optional<WorkerId> RouterReplicaHost::find_worker(std::string_view identity) {
  const std::lock_guard lock(mutex_);
  const auto found = workers_.find(identity);
  return found == workers_.end() ? std::nullopt : std::optional(found->second);
}

std::string RouterReplicaHost::identity(WorkerId worker) {
  const std::lock_guard lock(mutex_);
  return identities_[worker];
}

Ticket RouterReplicaHost::add(WorkerId worker, const PeerRequest& request, std::span<const PrefixHash> prefixes,
                              bool fresh) {
  if (fresh) loads_.add_waiting(worker);  // what has been there for a while, the worker has counted
  if (!account_ || request.ticket == 0) return 0;
  return account_->enter_of_peer({.worker = worker,
                                  .num_tokens = request.num_tokens,
                                  .miss_tokens = request.miss_tokens,
                                  .prompt = request.prompt,
                                  .prefilled = request.prefilled,
                                  .of_peer = true},
                                 prefixes);
}

void RouterReplicaHost::first_token(Ticket ticket) {
  account_->first_token(ticket);
}

void RouterReplicaHost::complete(Ticket ticket, const Completion& completion) {
  account_->complete(ticket, completion);
}

void RouterReplicaHost::drop(std::span<const Ticket> tickets) {
  account_->drop(tickets);
}

std::size_t RouterReplicaHost::own_requests(std::size_t begin, std::size_t end, std::vector<PeerRequest>& out) {
  if (!account_) return 0;
  return account_->for_each_own(begin, end, [&](Ticket ticket, const InFlight::Sent& sent) {
    out.push_back({ticket, sent.worker, sent.num_tokens, sent.miss_tokens, sent.prompt, sent.prefilled});
  });
}

}  // namespace kvrouter
