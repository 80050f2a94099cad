// What this replica's decisions leave for its peers: a bounded queue from the threads that decide to the one that
// sends.
//
// A push takes a lock for the time of a copy, and wakes the sender only if it has nothing to do; it never waits for the
// network.  What does not fit is dropped and counted: the next state makes good for it.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "replica/message.h"

namespace kvrouter {

// Events with this router's own worker numbers in place of places in a message.
struct OutgoingEvents {
  std::vector<PeerEvent> events;
  std::vector<PrefixHash> prefixes;
  std::uint64_t dropped = 0;

  void clear() {
    events.clear();
    prefixes.clear();
    dropped = 0;
  }
};

class Outbox {
 public:
  static constexpr std::size_t kMostEvents = 1 << 15;
  static constexpr std::size_t kMostPrefixes = 1 << 20;  // 8 MiB

  // wake: called for the first event after a take().
  explicit Outbox(std::function<void()> wake) : wake_(std::move(wake)) {}

  // append(prefixes): puts the request's prefixes behind those that are there; how many.
  template <typename Append>
  void push_routed(const PeerRequest& request, Append append) {
    PeerEvent event;
    event.kind = PeerEvent::Kind::kRouted;
    event.request = request;
    push(event, append);
  }
  void push_first_token(Ticket ticket) {
    PeerEvent event;
    event.kind = PeerEvent::Kind::kFirstToken;
    event.request.ticket = ticket;
    push(event, [](auto&) { return std::size_t{0}; });
  }
  void push_complete(Ticket ticket, const Completion& completion) {
    PeerEvent event;
    event.kind = PeerEvent::Kind::kComplete;
    event.request.ticket = ticket;
    event.completion = completion;
    push(event, [](auto&) { return std::size_t{0}; });
  }

  // All that was pushed since, in exchange for an empty `out`, whose memory is used on.
  void take(OutgoingEvents& out) {
    out.clear();
    const std::lock_guard lock(mutex_);
    std::swap(out, pending_);
  }

 private:
  template <typename Append>
  void push(PeerEvent& event, Append append) {
    {
      const std::lock_guard lock(mutex_);
      if (pending_.events.size() >= kMostEvents || pending_.prefixes.size() >= kMostPrefixes) {
        ++pending_.dropped;
        return;
      }
      event.begin = pending_.prefixes.size();
      event.count = append(pending_.prefixes);
      pending_.events.push_back(event);
      if (pending_.events.size() > 1) return;
    }
    wake_();
  }

  std::mutex mutex_;
  OutgoingEvents pending_;
  std::function<void()> wake_;
};

}  // namespace kvrouter
