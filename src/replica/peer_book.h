// What one peer has in flight, as its messages tell: turned into entries of this replica's own account, and out of it
// again when the peer says so, or is gone.
//
// Messages may be lost, doubled and late.  Each is a step that can be left out or done twice; now and then a state
// tells all that the peer has under a range of tickets, and what differs is put right.  Not safe for threads.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string_view>

#include "replica/message.h"

namespace kvrouter {

// The account that the entries go into.
class PeerSink {
 public:
  virtual ~PeerSink() = default;
  // The worker of this name, if there is one.
  virtual std::optional<WorkerId> find_worker(std::string_view identity) = 0;
  // A request is at `worker`.  `fresh`: it was sent there just now, and with it these prefixes are on their way; else
  // it has been there for a while.  The ticket of its entry, 0 if there is none.
  virtual Ticket add(WorkerId worker, const PeerRequest& request, std::span<const PrefixHash> prefixes, bool fresh) = 0;
  virtual void first_token(Ticket ticket) = 0;
  virtual void complete(Ticket ticket, const Completion& completion) = 0;
  // These entries go, as if they had never been.
  virtual void drop(std::span<const Ticket> tickets) = 0;
};

class PeerBook {
 public:
  // Requests in flight of one peer; those beyond are not entered, and counted.
  static constexpr std::size_t kMost = 1 << 16;

  struct Counts {
    std::uint64_t messages = 0;         // applied
    std::uint64_t missed = 0;           // by their sequence numbers
    std::uint64_t duplicates = 0;       // or late ones: ignored
    std::uint64_t malformed = 0;        // ignored
    std::uint64_t unknown_workers = 0;  // events about workers that this replica does not have: ignored
    std::uint64_t not_entered = 0;      // requests beyond kMost
  };
  enum class Outcome { kApplied, kIgnored, kMalformed, kOtherBlockSize, kOwn, kBye };

  // own_incarnation: of this replica, whose messages it ignores.
  PeerBook(std::uint64_t own_incarnation, std::size_t block_size, PeerSink& sink)
      : own_(own_incarnation), block_size_(block_size), sink_(sink) {}

  Outcome on_message(std::span<const std::byte> bytes);
  // The peer is gone: so are its entries.
  void forget();

  std::size_t size() const { return entries_.size(); }
  const Counts& counts() const { return counts_; }

 private:
  struct Entry {
    Ticket theirs = 0;
    Ticket ours = 0;
    WorkerId worker = 0;
    bool prefilled = false;
  };
  using Entries = std::map<std::uint32_t, Entry>;  // by the slot of their ticket

  static std::uint32_t slot_of(Ticket ticket) { return static_cast<std::uint32_t>(ticket); }
  void apply(const PeerEvent& event);
  void on_routed(const PeerRequest& request, std::span<const PrefixHash> prefixes);
  void on_state(const PeerEvent& state);
  void enter(const PeerRequest& request, std::span<const PrefixHash> prefixes, bool fresh);
  std::optional<WorkerId> worker_of(const PeerRequest& request);
  Entries::iterator find(Ticket theirs);
  void drop(Entries::iterator entry);  // with the next drop_all()
  void drop_all();

  const std::uint64_t own_;
  const std::size_t block_size_;
  PeerSink& sink_;
  PeerMessage message_;
  std::optional<std::uint64_t> incarnation_;
  std::uint64_t last_sequence_ = 0;
  Entries entries_;
  std::vector<Ticket> dropped_;
  Counts counts_;
};

}  // namespace kvrouter
