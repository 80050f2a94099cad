// What the router itself has in flight at each worker: requests sent and not known to be done, the prefill they still
// need, the KV blocks they hold, and how quickly each worker prefills.
//
// Feedback makes it exact: first_token() and complete(), under the ticket that a routed request was given.  vLLM admits
// first come first served, so a request's first token says that those sent before it are prefilled too.  Between two
// such signs the prefill drains at the rate learnt from the ones before.  All feedback is optional:
//  - load messages correct the account: requests that a worker does not count any more are dropped, the oldest first,
//    but never ones that the message could not know of yet;
//  - whatever is neither finished nor corrected ends after kExpiry.
//
// Times are seconds of any clock that never goes back.  Not safe for threads.  Allocates only to grow.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvrouter/policy.h"
#include "kvrouter/worker_load.h"

namespace kvrouter {

class InFlight {
 public:
  static constexpr double kExpiry = 900;  // seconds
  // Beyond so many requests in flight, the oldest of the worker that gets another is taken for done, and counted.
  static constexpr std::size_t kMost = 1 << 20;
  // A load message may be this old, in seconds, while nobody reports completions.
  static constexpr double kMessageAge = 0.5;
  // Seconds of prefill a token before anything is learnt: an 8B model on an A100 (docs/policies.md).
  static constexpr double kPriorSecondsPerToken = 1e-4;

  struct Sent {
    WorkerId worker = 0;
    std::size_t num_tokens = 0;   // of the prompt
    std::size_t miss_tokens = 0;  // of these, not expected in the worker's cache
    std::uint64_t prompt = 0;     // names the prompt, for the lengths of its outputs; 0: no name
    bool prefilled = false;       // its first token is out already
    bool of_peer = false;         // sent by another replica
  };

  explicit InFlight(std::size_t num_workers);

  Ticket add(double now, const Sent& sent);
  // Each false for a ticket that is unknown, finished or expired.
  bool first_token(double now, Ticket ticket);
  bool complete(double now, Ticket ticket, const Completion& completion);
  // These requests do not count any more, as if they had never been sent; tickets that are not known are passed over.
  void drop(std::span<const Ticket> tickets);
  // What a worker said last; `version` counts its words.  Cheap when there is none new.
  void on_load(double now, WorkerId worker, const WorkerLoad& said, std::uint64_t version);
  // Everything that was sent to `worker` is lost (it is down).
  void drop_all(WorkerId worker);

  // Fills the rows' columns of the router's own account.
  void fill(double now, std::span<WorkerView> rows);
  // Tokens that the outputs of this prompt had so far on average; of all prompts where it has none; 0 before any.
  double expected_output(std::uint64_t prompt) const;

  // Calls f(ticket, sent) for each request in flight that this replica has sent, of those whose ticket has its lower 32
  // bits in [begin, end), in the order of these.
  template <typename F>
  void for_each_own(std::size_t begin, std::size_t end, F f) const {
    for (std::size_t i = begin; i < std::min(end, entries_.size()); ++i) {
      const Entry& entry = entries_[i];
      if (!entry.used || entry.of_peer) continue;
      f(ticket_of(i), Sent{entry.worker, static_cast<std::size_t>(entry.context_tokens),
                           static_cast<std::size_t>(entry.miss_tokens), entry.prompt, entry.prefilled});
    }
  }
  std::size_t num_slots() const { return entries_.size(); }

  std::size_t size() const { return size_; }
  std::uint64_t dropped() const { return dropped_; }  // at kMost

 private:
  using Index = std::uint32_t;
  static constexpr Index kNone = ~Index{0};

  struct Entry {
    WorkerId worker = 0;
    std::uint32_t generation = 1;  // of the slot: makes tickets unique
    bool used = false;
    bool prefilled = false;
    bool of_peer = false;
    bool dropped = false;                  // about to be removed
    Index previous = kNone, next = kNone;  // in the order of sending, per worker; `next` alone in the free list
    double sent_at = 0;
    double started_after = 0;  // tokens of prefill sent to the worker before it
    double miss_tokens = 0;
    double context_tokens = 0;
    std::uint64_t prompt = 0;
  };
  struct WorkerAccount {
    Index first = kNone, last = kNone;
    std::int64_t count = 0;
    std::int64_t prefilling = 0;
    double context_tokens = 0;
    double sent_prefill = 0;  // tokens, since the start
    double done_prefill = 0;  // of these
    double known_done = 0;    // done_prefill as the last first token said, and when
    double known_at = 0;
    double drained_at = 0;
    double seconds_per_token = 0;  // 0: not learnt yet
    double learnt_tokens = 0;      // what that is learnt from
    std::uint64_t load_version = 0;
  };
  struct Lengths {
    std::uint64_t prompt = 0;
    double mean = 0;
  };

  Entry* find(Ticket ticket);
  Ticket ticket_of(std::size_t index) const { return std::uint64_t{entries_[index].generation} << 32 | index; }
  void on_prefilled(double now, Entry& entry);
  void learn(WorkerAccount& account, double seconds, double tokens);
  void drain(double now, WorkerAccount& account);
  void remove(Index index);
  double seconds_per_token(const WorkerAccount& account) const;

  std::vector<Entry> entries_;
  Index free_ = kNone;
  std::size_t size_ = 0;
  std::uint64_t dropped_ = 0;
  std::vector<WorkerAccount> workers_;
  double fleet_seconds_per_token_ = 0;
  double last_completion_ = -1e18;
  std::vector<Lengths> lengths_;
  double mean_output_ = 0;
};

}  // namespace kvrouter
