// The other replicas of this router: one thread that tells them what this one sends where, and enters what they tell.
//
// A PUB socket is bound, and a SUB socket connected to each peer's.  Events go out as they come, many to a message
// where they come fast; a state of all that is in flight every kStateInterval, after which a peer that missed something
// is right again; a heartbeat when there is nothing to say.  A peer that is silent for the timeout is gone: what it had
// in flight does not count any more.
//
// Threads: routed(), first_token(), complete() and status() from any; start() and stop() one at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvrouter/router.h"
#include "replica/outbox.h"
#include "replica/peer_book.h"

namespace kvrouter {

// The router, as its replication sees it.  Called by the replicas' thread.
class ReplicaHost : public PeerSink {
 public:
  // "": it has no address.
  virtual std::string identity(WorkerId worker) = 0;
  // Appends this replica's own requests in flight whose tickets have their lower 32 bits in [begin, end), in that
  // order; how many such slots there are at all.  `worker` of a request is this router's number.
  virtual std::size_t own_requests(std::size_t begin, std::size_t end, std::vector<PeerRequest>& out) = 0;
  virtual void tell(RouterNotice::Level level, const std::string& text) = 0;
};

class Replicas {
 public:
  static constexpr std::chrono::milliseconds kStateInterval{1000};
  static constexpr std::chrono::milliseconds kHeartbeat{200};

  // The host must outlive it.
  Replicas(const ReplicaOptions& options, std::size_t block_size, ReplicaHost& host);
  ~Replicas();  // stop()
  Replicas(const Replicas&) = delete;
  Replicas& operator=(const Replicas&) = delete;

  // Throws std::runtime_error for an address that cannot be bound or connected to.
  void start();
  void stop();

  // append: see Outbox.
  template <typename Append>
  void routed(const PeerRequest& request, Append append) {
    outbox_.push_routed(request, append);
  }
  void routed_untracked(WorkerId worker, std::size_t num_tokens);
  void first_token(Ticket ticket) { outbox_.push_first_token(ticket); }
  void complete(Ticket ticket, const Completion& completion) { outbox_.push_complete(ticket, completion); }

  ReplicaStatus status() const;

 private:
  class Link;
  void wake();

  const ReplicaOptions options_;
  const std::size_t block_size_;
  ReplicaHost& host_;
  int wake_;  // eventfd
  Outbox outbox_;
  mutable std::mutex status_mutex_;
  ReplicaStatus status_;
  std::unique_ptr<Link> link_;
};

}  // namespace kvrouter
