// The router: listens to what every worker caches and how loaded it is, and chooses a worker for each request.
//
// A decision never waits for the network: it reads the prefix index and the load table as they are.  Whatever fails
// inside a decision, the request still gets a worker (round robin), and the first failure is told as a notice.
//
// Threads: choose() and its kin, round_robin(), reset(), status() and next_notice() may be called from any thread,
// before, while and after the router runs.  start() and stop() are idempotent and may be called from any thread.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/policy.h"
#include "kvrouter/prefix_index.h"
#include "kvrouter/worker_load.h"

namespace kvrouter {

// Where a worker speaks.  Any of them may be empty: it is not listened to.
struct WorkerEndpoints {
  std::string kv_events;  // "tcp://host:port" of its KV-event publisher
  std::string load;       // "tcp://host:port" of its load publisher
  std::string http;       // "http(s)://host:port", whose /metrics is read while there is no load publisher
  std::string replay{};   // "tcp://host:port" that replays past KV events; empty: what is lost is learnt anew
  // The engine whose samples count on that page: its rank, where a server has several (data parallelism).
  std::optional<unsigned> engine{};
};

// Other replicas of the router, which route to the same workers: they tell each other what they send where.
struct ReplicaOptions {
  std::string bind;                // "tcp://address:port" at which this one is heard by the others; empty: by nobody
  std::vector<std::string> peers;  // at which each of the others is heard; one that is this replica itself is left out
  std::chrono::milliseconds timeout{3000};  // of silence, after which what a peer has in flight counts no more
  static constexpr std::chrono::milliseconds kMinTimeout{500};

  bool wanted() const { return !bind.empty() || !peers.empty(); }
};

struct RouterOptions {
  std::size_t block_size = 64;  // tokens; must be the workers' own
  std::vector<WorkerEndpoints> workers;
  std::string policy = "linear";
  std::uint64_t seed = 0;
  // How long after start() a worker may be silent before a notice says so.
  std::chrono::milliseconds startup_grace{5000};
  std::chrono::milliseconds metrics_interval{250};
  std::string ca_file;  // PEM: whom to trust for workers' https addresses; empty: the system's authorities
  // Bytes that the prefix index may take, 0: no limit.  At least kMinIndexMemory.
  std::size_t index_memory_limit = 0;
  static constexpr std::size_t kMinIndexMemory = 1 << 20;
  // How long a worker that was sent requests may say nothing before it is suspected: longer than any step of its
  // engine. One that cannot be probed (no http) gets requests again after twice as long.
  std::chrono::milliseconds suspect_after{5000};
  // Seconds of a clock that never goes back, for the router's account of what is in flight.  Default: the system's
  // steady clock; simulations set their own.
  std::function<double()> clock;
  ReplicaOptions replica;
};

// A request, and who may serve it.
struct RouteQuery {
  std::span<const LocalHash> blocks;  // hashes of its full blocks
  std::size_t num_tokens = 0;         // > 0
  // One entry a worker, 0: never to be chosen, however loaded the others are.  Empty: all may be.
  std::span<const std::uint8_t> eligible{};
};

// One request of a batch that is decided together.
struct BatchRequest {
  std::span<const LocalHash> blocks;  // hashes of its full blocks
  std::size_t num_tokens = 0;         // > 0
  double expected_output = 0;         // tokens, a hint; 0: not known
};

// What the caller needs of a decision...
struct Choice {
  WorkerId worker = 0;
  std::uint32_t overlap_blocks = 0;  // leading blocks of the request that the worker holds (in a batch: or is sent)
  Ticket ticket = 0;                 // for feedback; 0 where the policy keeps no account
};

// ... and how it came about: one entry a worker.
struct Decision {
  Choice choice;
  std::size_t num_blocks = 0;  // full blocks of the request
  std::size_t num_tokens = 0;
  std::vector<double> scores;
  std::vector<std::uint32_t> overlap_blocks;
  std::vector<WorkerLoad> loads;  // as the policy saw them
};

// What a worker's hit on a request was, beside what was predicted.
struct HitReport {
  std::uint32_t overlap_blocks = 0;  // of the decision
  std::size_t num_tokens = 0;        // of the prompt
  std::size_t cached_tokens = 0;     // of these, taken from the worker's cache, as it says
  // Hashes of the request's full blocks.  Optional: with them, prefixes that were on their way when the request was
  // decided are told from blocks that the router does not know of.
  std::span<const LocalHash> blocks{};
};

// The same of many requests together, from counters.
struct HitTotals {
  std::uint64_t requests = 0;
  std::uint64_t prompt_tokens = 0;
  std::uint64_t predicted_tokens = 0;
  std::uint64_t cached_tokens = 0;
};

// Why a worker hits its cache otherwise than predicted; src/router/self_check.cc says what helps.
enum class HitCause {
  kNone,
  kClearedLate,
  kOtherGroups,
  kEvicted,
  kOtherNamespace,
  kNoEvents,
  kBlockSize,
  kUnreadable,
  kLostEvents,
  kIndexLimit,
  kOtherMemory,
  kLateStart,
  kOtherTokens,
  kUnknown,
};
std::string_view name_of(HitCause cause);  // "" for kNone

struct HitCheckStatus {
  std::uint64_t reports = 0;
  std::uint64_t prompt_tokens = 0;
  std::uint64_t predicted_tokens = 0;
  std::uint64_t cached_tokens = 0;
  std::uint64_t missing_tokens = 0;  // predicted, not found
  std::uint64_t surplus_tokens = 0;  // found, not predicted
  std::uint64_t episodes = 0;        // of divergence
  HitCause cause = HitCause::kNone;  // of the one that lasts, if any
};

// kSuspect: was sent requests and has said nothing since, for too long; it gets nothing while others are up.
enum class WorkerState { kConnecting, kUp, kDown, kSuspect };
enum class LoadSource { kNone, kMessages, kMetrics };
// How much of a worker's cache the index knows: all of it, a part (what is known is true), or, while a replay is under
// way, what was known before.
enum class CacheKnowledge { kPartial, kWhole, kRecovering };

struct WorkerStatus {
  WorkerState state = WorkerState::kConnecting;
  LoadSource load_source = LoadSource::kNone;
  WorkerEndpoints endpoints;
  WorkerLoad load;
  std::size_t cached_blocks = 0;
  std::uint64_t decisions = 0;  // requests sent to it
  KvEventCounts events;
  std::uint64_t gaps = 0;
  std::uint64_t missed_batches = 0;
  std::uint64_t duplicates = 0;
  std::uint64_t restarts = 0;
  CacheKnowledge knowledge = CacheKnowledge::kPartial;
  std::uint64_t resyncs = 0;           // replays that brought the index up to date with the worker
  std::uint64_t replayed_batches = 0;  // batches applied that a replay brought
  std::uint64_t warm_starts = 0;       // times that a snapshot's part about it was confirmed
  std::uint64_t failed_replays = 0;    // requests for a replay that were not answered, or not as they should be
  std::uint64_t load_messages = 0;
  std::uint64_t malformed_load_messages = 0;
  HitCheckStatus hits;
};

inline constexpr std::array<double, 12> kDecisionBounds = {1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5,
                                                           1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1};

// The account of what is in flight; all 0 where the policy keeps none.
struct AccountStatus {
  std::size_t requests = 0;            // in flight, as far as is known
  std::uint64_t dropped_requests = 0;  // taken for done, as there were too many
  std::uint64_t ended_early = 0;       // times that prefixes on their way were too many to keep
};

// What is exchanged with other replicas; all 0 without any.
struct ReplicaStatus {
  std::size_t peers = 0;             // that are listened to
  std::size_t live = 0;              // of these, heard of late
  std::size_t requests = 0;          // of peers, in flight
  std::uint64_t sent = 0;            // messages
  std::uint64_t received = 0;        // messages
  std::uint64_t missed = 0;          // messages of peers, by their numbers
  std::uint64_t malformed = 0;       // messages
  std::uint64_t ignored_events = 0;  // about workers that are not known here, or beyond a peer's limit
  std::uint64_t dropped_events = 0;  // of this replica's own, as they came faster than they could be sent
  std::uint64_t losses = 0;          // times that a peer fell silent
};

struct RouterStatus {
  bool running = false;
  std::uint64_t decisions = 0;
  std::uint64_t fallbacks = 0;  // decisions that failed and went round robin
  double decision_p50_us = 0;
  double decision_p99_us = 0;
  double decision_seconds = 0;  // all decisions together, to a bucket's width
  // How many took at most kDecisionBounds[i] seconds.
  std::array<std::uint64_t, kDecisionBounds.size()> decision_counts{};
  PrefixIndexStats index;
  std::vector<WorkerStatus> workers;
  AccountStatus account;
  ReplicaStatus replica;
  std::uint64_t notices_dropped = 0;
};

struct RouterNotice {
  enum class Level { kInfo, kWarning, kError };
  Level level = Level::kInfo;
  std::string text;
};

class Router {
 public:
  // Throws std::invalid_argument when an option is out of range; the message names it.
  explicit Router(RouterOptions options);
  ~Router();  // stop()
  Router(const Router&) = delete;
  Router& operator=(const Router&) = delete;

  // Connects to the workers and listens, until stop().  kv_events false: to their load only.  Starts with an empty
  // index.  Throws std::runtime_error when the operating system refuses sockets or threads.
  void start(bool kv_events = true);
  void stop();
  bool running() const;

  std::size_t num_workers() const;
  std::size_t block_size() const;
  const std::string& policy() const;

  // The worker for a request of `num_tokens` tokens whose full blocks have these hashes.
  // REQUIRES (all four): num_tokens > 0.
  Choice choose(std::span<const LocalHash> blocks, std::size_t num_tokens);
  Choice choose_for_tokens(std::span<const TokenId> tokens, NamespaceHash ns = 0);
  Decision explain(std::span<const LocalHash> blocks, std::size_t num_tokens);
  // REQUIRES (here and below): if `eligible` is given, it has num_workers() entries, one of which is not 0.
  Decision explain_for_tokens(std::span<const TokenId> tokens, NamespaceHash ns = 0,
                              std::span<const std::uint8_t> eligible = {});
  Decision explain(const RouteQuery& query);
  // A worker for each of the requests, in their order.  The decisions know of each other: a prefix that one of them
  // sends to a worker counts as held there for the rest, so that the samples of a prompt which nobody has cached yet
  // stay together; and a group is split before a worker has much more than its share of tokens.
  // REQUIRES: choices.size() == requests.size(); num_tokens > 0 for all.
  void choose_batch(std::span<const BatchRequest> requests, std::span<Choice> choices);
  void choose_batch_for_tokens(std::span<const std::span<const TokenId>> requests, NamespaceHash ns,
                               std::span<Choice> choices);
  // The next worker in turn, workers that are down left out.
  WorkerId round_robin();

  // Feedback, which is optional: without it the account of what is in flight is corrected by load messages.  False for
  // a ticket that is not known (any more).
  bool first_token(Ticket ticket);
  bool complete(Ticket ticket, const Completion& completion = {});

  // What the worker's hit was.  Also optional: by it the router notices that its belief is not true, and says why.
  // REQUIRES: worker < num_workers().
  void report_hit(WorkerId worker, const HitReport& report);
  void report_hits(WorkerId worker, const HitTotals& totals);

  // Listens to another address for `worker` from now on (empty endpoints: to none), and forgets what was known of it.
  // A fleet that grows is built with as many workers as it may have, those without an address to come later.
  // Throws std::invalid_argument for a malformed endpoint.
  // REQUIRES: worker < num_workers().
  void set_worker(WorkerId worker, WorkerEndpoints endpoints);

  // Whether requests may go to `worker` (at first they may).  Where no worker is enabled, all are.
  void enable(WorkerId worker, bool enabled);

  // Forgets what `worker` (or every worker) caches: for use around a weight update, which empties caches at once and is
  // told by events only later.
  //   kNow           what workers store from now on counts
  //   kUntilCleared  what they store counts once they have said that their cache is cleared: call this before they are
  //                  told to clear it, so that no event of the old cache is believed.  A worker that did not clear its
  //                  cache after all wants kNow then.  Without a connection to the worker's events it is kNow.
  enum class Reset { kNow, kUntilCleared };
  void reset(std::optional<WorkerId> worker = std::nullopt, Reset kind = Reset::kNow);

  // What is known of the workers' caches, as bytes for warm_start().  Workers of which it could not be said that they
  // are the same later (without replays, behind a fence, while a replay is under way) are left out.  Takes a moment:
  // from worker to worker the network thread is held up while the index is walked.  Throws std::length_error beyond 1
  // GiB.
  std::string snapshot();
  // Starts with a snapshot, of this router before or of another.  What it says of a worker counts once that worker,
  // having come by start() or set_worker(), has shown that it is in the same life, and has replayed what it published
  // since; it is dropped otherwise, and by a reset().  Parts of workers that have come already, or never come, do
  // nothing. The number of workers that it is about.  Throws std::invalid_argument, with the reason, for what is no
  // snapshot.
  std::size_t warm_start(std::span<const std::byte> snapshot);

  RouterStatus status() const;
  // The next thing that the operator should know; nothing after `timeout` or when stopped and all is told.
  std::optional<RouterNotice> next_notice(std::chrono::milliseconds timeout);

  // For tests, and for callers that have the events by other means.
  PrefixIndex& index();
  LoadTable& loads();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
