// The router's account as its replicas see it: what peers have sent goes in beside what this router has.
#pragma once

#include <atomic>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvrouter/policy.h"
#include "replica/replicas.h"
#include "router/account.h"
#include "router/notices.h"

namespace kvrouter {

class RouterReplicaHost final : public ReplicaHost {
 public:
  // account: null where the policy keeps none; requests of peers then wait at their worker until its next load message,
  // as this router's own do.
  RouterReplicaHost(const std::vector<WorkerEndpoints>& workers, Account* account, LoadTable& loads, Notices& notices);

  // From any thread.
  void set_worker(WorkerId worker, const WorkerEndpoints& endpoints);
  // Which of equally good workers takes a prompt, so that replicas which have not heard of each other's decision yet
  // take the same one (rendezvous hashing over the workers' names).
  void set_precedence(std::span<const LocalHash> blocks, std::span<WorkerView> views) const;

  std::optional<WorkerId> find_worker(std::string_view identity) override;
  std::string identity(WorkerId worker) override;
  Ticket add(WorkerId worker, const PeerRequest& request, std::span<const PrefixHash> prefixes, bool fresh) override;
  void first_token(Ticket ticket) override;
  void complete(Ticket ticket, const Completion& completion) override;
  void drop(std::span<const Ticket> tickets) override;
  std::size_t own_requests(std::size_t begin, std::size_t end, std::vector<PeerRequest>& out) override;
  void tell(RouterNotice::Level level, const std::string& text) override { notices_.post(level, text); }

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };

  Account* account_;
  LoadTable& loads_;
  Notices& notices_;
  std::vector<std::atomic<std::uint64_t>> names_;  // hashes of identities, for decisions
  std::mutex mutex_;                               // guards what follows
  std::vector<std::string> identities_;
  std::unordered_map<std::string, WorkerId, Hash, std::equal_to<>> workers_;
};

}  // namespace kvrouter
