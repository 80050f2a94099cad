#include "kvrouter/router.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "load/metrics_scraper.h"
#include "router/account.h"
#include "router/batch_view.h"
#include "router/connections.h"
#include "router/fenced_sink.h"
#include "router/latency_histogram.h"
#include "router/notices.h"
#include "router/replica_host.h"
#include "router/self_check.h"

namespace kvrouter {
namespace {

// splitmix64 over a shared counter: a draw is one atomic addition.
class SharedRandom final : public Random {
 public:
  explicit SharedRandom(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() override {
    constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15ull;
    std::uint64_t x = state_.fetch_add(kStep, std::memory_order_relaxed) + kStep;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  }

 private:
  std::atomic<std::uint64_t> state_;
};

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void validate(const RouterOptions& options) {
  if (options.workers.empty()) throw std::invalid_argument("num_workers must be at least 1, got 0");
  if (options.block_size == 0) throw std::invalid_argument("block_size must be at least 1, got 0");
  if (options.index_memory_limit > 0 && options.index_memory_limit < RouterOptions::kMinIndexMemory) {
    throw std::invalid_argument("index_memory_limit must be 0 (none) or at least " +
                                std::to_string(RouterOptions::kMinIndexMemory) + " bytes, got " +
                                std::to_string(options.index_memory_limit));
  }
  for (const WorkerEndpoints& worker : options.workers) validate_worker_url(worker.http);
  if (options.replica.timeout < ReplicaOptions::kMinTimeout) {
    throw std::invalid_argument("replica_timeout must be at least 0.5 seconds: silence shorter than that is no sign");
  }
}

// Working memory of a decision, one a thread: steady state allocates nothing.
struct Scratch {
  std::vector<std::uint32_t> overlap;
  std::vector<WorkerView> views;
  std::vector<std::uint8_t> available;
  std::vector<double> scores;
  std::vector<LocalHash> hashes;
  std::vector<PrefixHash> prefixes;
  std::vector<BatchRequest> requests;
  BatchView batch;
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

}  // namespace

class Router::Impl {
 public:
  explicit Impl(RouterOptions options)
      : options_((validate(options), std::move(options))),
        policy_(make_policy(options_.policy)),
        round_robin_(make_policy("round_robin")),
        random_(options_.seed),
        index_(options_.workers.size(), options_.index_memory_limit),
        loads_(options_.workers.size()),
        decisions_(std::make_unique<std::atomic<std::uint64_t>[]>(options_.workers.size())),
        disabled_(std::make_unique<std::atomic<bool>[]>(options_.workers.size())) {
    for (WorkerId w = 0; w < options_.workers.size(); ++w) sinks_.emplace_back(index_, w);
    if (!policy_) {
      throw std::invalid_argument("policy '" + options_.policy + "' is unknown; there are: " + join(policy_names()));
    }
    if (policy_->uses_account()) {
      account_ = std::make_unique<Account>(options_.workers.size(), options_.block_size,
                                           options_.clock ? options_.clock : steady_seconds);
    }
    if (options_.replica.wanted()) {
      replica_host_.emplace(options_.workers, account_.get(), loads_, notices_);
      replicas_ = std::make_unique<Replicas>(options_.replica, options_.block_size, *replica_host_);
    }
  }
  ~Impl() { stop(); }

  void start(bool kv_events) {
    const std::lock_guard lifecycle(lifecycle_mutex_);
    if (running()) return;
    notices_.reopen();
    reset(std::nullopt, Reset::kNow);
    auto connections = std::make_unique<Connections>(
        Connections::Context{options_, sinks_, loads_, notices_, decisions_.get(), connections_mutex_,
                             [this](const WorkerEndpoints& endpoints) { return take_snapshot(endpoints); }},
        kv_events);
    if (replicas_) replicas_->start();
    const std::unique_lock lock(connections_mutex_);
    connections_ = std::move(connections);
  }

  void stop() {
    const std::lock_guard lifecycle(lifecycle_mutex_);
    std::unique_ptr<Connections> stopped;
    {
      const std::unique_lock lock(connections_mutex_);
      stopped = std::move(connections_);
    }
    if (replicas_) replicas_->stop();
    stopped.reset();  // joins its threads: outside the lock, so that decisions go on meanwhile
    notices_.close();
  }

  bool running() const {
    const std::shared_lock lock(connections_mutex_);
    return connections_ != nullptr;
  }

  const RouterOptions& options() const { return options_; }

  bool first_token(Ticket ticket) {
    const bool known = account_ && account_->first_token(ticket);
    if (known && replicas_) replicas_->first_token(ticket);
    return known;
  }
  bool complete(Ticket ticket, const Completion& completion) {
    const bool known = account_ && account_->complete(ticket, completion);
    if (known && replicas_) replicas_->complete(ticket, completion);
    return known;
  }

  Choice choose(const RouteQuery& query, Decision* explain = nullptr) {
    const auto begin = std::chrono::steady_clock::now();
    Choice choice;
    try {
      choice = choose_by_policy(query, explain);
    } catch (const std::exception& error) {
      on_failure(error, 1);
      choice = {next_in_turn(query.eligible), 0};
    }
    count(choice.worker);
    if (replicas_ && choice.ticket == 0) replicas_->routed_untracked(choice.worker, query.num_tokens);
    const auto elapsed = std::chrono::steady_clock::now() - begin;
    latency_.record(static_cast<std::uint64_t>(std::chrono::nanoseconds(elapsed).count()));
    return choice;
  }

  Choice choose_for_tokens(std::span<const TokenId> tokens, NamespaceHash ns, Decision* explain = nullptr,
                           std::span<const std::uint8_t> eligible = {}) {
    std::vector<LocalHash>& hashes = scratch().hashes;
    hashes.resize(tokens.size() / options_.block_size);
    hash_blocks(tokens, options_.block_size, ns, hashes);
    return choose({hashes, tokens.size(), eligible}, explain);
  }

  void choose_batch(std::span<const BatchRequest> requests, std::span<Choice> choices) {
    if (requests.empty()) return;
    const auto begin = std::chrono::steady_clock::now();
    Scratch& s = scratch();
    bool begun = false;
    try {
      s.scores.resize(options_.workers.size());
      view_workers(s.views);
      s.batch.begin({index_, loads_, account_.get()}, options_.block_size, requests, s.views, choices);
      begun = true;
      policy_->choose_batch(s.batch, random_, s.scores);
      s.batch.enter();
      if (replicas_ && account_) {
        for (std::size_t i = 0; i < requests.size(); ++i) {
          tell_replicas(s.batch.request(i), choices[i], choices[i].overlap_blocks);
        }
      }
    } catch (const std::exception& error) {
      on_failure(error, requests.size() - (begun ? s.batch.num_assigned() : 0));
      for (std::size_t i = 0; i < requests.size(); ++i) {
        if (!begun || !s.batch.assigned(i)) choices[i] = {next_in_turn(), 0};
      }
    }
    for (std::size_t i = 0; i < choices.size(); ++i) {
      count(choices[i].worker);
      if (replicas_ && choices[i].ticket == 0) {
        replicas_->routed_untracked(choices[i].worker, requests[i].num_tokens);
      }
    }
    const auto elapsed = std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
    const auto share = static_cast<std::uint64_t>(elapsed) / requests.size();
    for (std::size_t i = 0; i < requests.size(); ++i) latency_.record(share);
  }

  void choose_batch_for_tokens(std::span<const std::span<const TokenId>> requests, NamespaceHash ns,
                               std::span<Choice> choices) {
    Scratch& s = scratch();
    std::size_t num_blocks = 0;
    for (const auto tokens : requests) num_blocks += tokens.size() / options_.block_size;
    s.hashes.resize(num_blocks);
    s.requests.clear();
    std::span<LocalHash> rest = s.hashes;
    for (const auto tokens : requests) {
      const std::span<LocalHash> blocks = rest.first(tokens.size() / options_.block_size);
      rest = rest.subspan(blocks.size());
      hash_blocks(tokens, options_.block_size, ns, blocks);
      s.requests.push_back({blocks, tokens.size()});
    }
    choose_batch(s.requests, choices);
  }

  WorkerId round_robin() {
    const WorkerId worker = next_in_turn();
    count(worker);
    if (replicas_) replicas_->routed_untracked(worker, 1);  // how long it is, nobody said
    return worker;
  }

  void enable(WorkerId worker, bool enabled) {
    if (disabled_[worker].exchange(!enabled) != !enabled) num_disabled_ += enabled ? -1 : 1;
  }

  void set_worker(WorkerId worker, WorkerEndpoints endpoints) {
    validate_worker_url(endpoints.http);
    const std::lock_guard lifecycle(lifecycle_mutex_);  // connections_ changes under it only
    if (connections_) {
      connections_->replace(worker, endpoints);  // and forgets what the worker held
    } else {
      sinks_[worker].lift();
    }
    if (replicas_) replica_host_->set_worker(worker, endpoints);
    {
      const std::unique_lock lock(connections_mutex_);
      options_.workers[worker] = std::move(endpoints);
    }
    loads_.update(worker, {});
    check_.forget(worker);
    if (account_) account_->forget_prefixes();
  }

  void report_hit(WorkerId worker, const HitReport& report) {
    std::optional<std::uint32_t> known_now;
    if (!report.blocks.empty()) {
      std::vector<std::uint32_t>& overlap = scratch().overlap;
      overlap.resize(options_.workers.size());
      index_.find_matches(report.blocks, overlap);
      known_now = overlap[worker];
    }
    check_.report(worker, report, known_now);
  }
  void report_hits(WorkerId worker, const HitTotals& totals) { check_.report(worker, totals); }

  // What workers that have not come yet are said to hold: a reset may be meant for them, too.
  void forget_snapshots() {
    const std::lock_guard lock(snapshots_mutex_);
    snapshots_.clear();
  }

  void reset(std::optional<WorkerId> worker, Reset kind) {
    const WorkerId first = worker.value_or(0);
    const WorkerId last = worker ? *worker + 1 : static_cast<WorkerId>(options_.workers.size());
    const std::shared_lock lock(connections_mutex_);
    for (WorkerId w = first; w < last; ++w) {
      // Without a connection nobody will say that the cache is cleared.
      const bool heard = connections_ && connections_->hears_kv_events(w);
      kind == Reset::kUntilCleared&& heard ? sinks_[w].fence() : sinks_[w].lift();
    }
    if (account_) account_->forget_prefixes();
  }

  std::string snapshot() {
    Snapshot snapshot{options_.block_size, {}};
    std::size_t bytes = 0;
    for (WorkerId w = 0; w < options_.workers.size(); ++w) {
      const std::lock_guard lifecycle(lifecycle_mutex_);  // of one worker at a time: others may come and go between
      if (!connections_) break;
      std::optional<WorkerSnapshot> worker = connections_->capture(w, index_);
      if (!worker) continue;
      for (const StoredChain& chain : worker->chains) bytes += 16 + sizeof(StoredBlock) * chain.blocks.size();
      if (bytes > Snapshot::kMaxBytes) throw std::length_error("a snapshot of this index would be larger than 1 GiB");
      // A worker that changed slots between two of these counts once.
      const auto same = [&](const WorkerSnapshot& other) { return other.identity == worker->identity; };
      if (std::none_of(snapshot.workers.begin(), snapshot.workers.end(), same)) {
        snapshot.workers.push_back(std::move(*worker));
      }
    }
    return encode(snapshot);
  }

  std::size_t warm_start(std::span<const std::byte> bytes) {
    Snapshot snapshot;
    if (const std::string error = decode(bytes, snapshot); !error.empty()) throw std::invalid_argument(error);
    if (snapshot.block_size != options_.block_size) {
      throw std::invalid_argument("it is of blocks of " + std::to_string(snapshot.block_size) + " tokens, not " +
                                  std::to_string(options_.block_size));
    }
    const std::lock_guard lock(snapshots_mutex_);
    snapshots_.clear();
    for (WorkerSnapshot& worker : snapshot.workers) snapshots_.emplace(worker.identity, std::move(worker));
    return snapshots_.size();
  }

  RouterStatus status() const {
    RouterStatus status;
    const std::shared_lock lock(connections_mutex_);
    status.running = connections_ != nullptr;
    status.fallbacks = fallbacks_.load(std::memory_order_relaxed);
    status.decision_p50_us = latency_.percentile(0.5) / 1e3;
    status.decision_p99_us = latency_.percentile(0.99) / 1e3;
    status.decision_seconds = latency_.sum() / 1e9;
    for (std::size_t i = 0; i < kDecisionBounds.size(); ++i) {
      status.decision_counts[i] = latency_.count_up_to(kDecisionBounds[i] * 1e9);
    }
    status.index = index_.stats();
    status.notices_dropped = notices_.dropped();
    if (account_) status.account = account_->status();
    if (replicas_) status.replica = replicas_->status();
    status.workers.resize(options_.workers.size());
    for (WorkerId w = 0; w < status.workers.size(); ++w) {
      WorkerStatus& worker = status.workers[w];
      if (connections_) connections_->describe(w, worker);
      worker.endpoints = options_.workers[w];
      worker.load = loads_.get(w);
      worker.cached_blocks = index_.held_blocks(w);
      worker.decisions = decisions_[w].load(std::memory_order_relaxed);
      worker.hits = check_.status(w);
      status.decisions += worker.decisions;
    }
    return status;
  }

  std::optional<Notice> next_notice(std::chrono::milliseconds timeout) { return notices_.next(timeout); }
  PrefixIndex& index() { return index_; }
  LoadTable& loads() { return loads_; }

 private:
  std::optional<WorkerSnapshot> take_snapshot(const WorkerEndpoints& endpoints) {
    const std::lock_guard lock(snapshots_mutex_);
    const auto found = snapshots_.find(identity_of(endpoints));
    if (found == snapshots_.end()) return std::nullopt;
    std::optional<WorkerSnapshot> snapshot = std::move(found->second);
    snapshots_.erase(found);
    return snapshot;
  }

  HitEvidence evidence(WorkerId worker) const {
    const PrefixIndexStats stats = index_.stats();
    WorkerStatus status;
    const std::shared_lock lock(connections_mutex_);
    if (connections_) connections_->describe(worker, status);
    return {status.events, status.gaps + status.restarts, stats.orphans, stats.given_up_blocks};
  }

  Choice choose_by_policy(const RouteQuery& query, Decision* explain) {
    const auto [blocks, num_tokens, eligible] = query;
    Scratch& s = scratch();
    const std::size_t n = options_.workers.size();
    s.overlap.resize(n);
    s.scores.resize(n);
    index_.find_matches(blocks, s.overlap);
    // The account forgets what is in flight at workers that are lost, not at those that this request may not go to.
    view_workers(s.views, account_ ? std::span<const std::uint8_t>{} : eligible);
    for (WorkerId w = 0; w < n; ++w) s.views[w].overlap_blocks = s.overlap[w];
    if (replica_host_) replica_host_->set_precedence(blocks, s.views);
    // Before the account is locked: who holds connections_mutex_ may ask it for its status.
    if (account_ && !eligible.empty()) find_available(eligible, s.available);
    RoutingRequest request{num_tokens, options_.block_size};
    Choice choice;
    if (account_) {
      s.prefixes.resize(blocks.size());
      hash_prefixes(blocks, s.prefixes);
      request.prefixes = s.prefixes;
      {
        const auto lock = account_->lock();
        account_->describe(loads_, index_, s.prefixes, s.views);
        for (WorkerId w = 0; w < n && !eligible.empty(); ++w) s.views[w].available = s.available[w] != 0;
        request.expected_output = account_->expected_output(s.prefixes);
        const WorkerId worker = policy_->choose(request, s.views, random_, s.scores);
        choice = {worker, s.overlap[worker], account_->enter(request, worker, s.views[worker].expected_blocks)};
      }
      if (replicas_) tell_replicas(request, choice, s.views[choice.worker].expected_blocks);
    } else {
      const WorkerId worker = policy_->choose(request, s.views, random_, s.scores);
      choice = {worker, s.overlap[worker]};
    }
    if (explain) {
      *explain = {choice, blocks.size(), num_tokens, s.scores, s.overlap, {}};
      for (const WorkerView& view : s.views) explain->loads.push_back({view.kv_usage, view.waiting, 0});
    }
    return choice;
  }

  void tell_replicas(const RoutingRequest& request, const Choice& choice, std::uint32_t expected_blocks) {
    replicas_->routed({.ticket = choice.ticket,
                       .worker = choice.worker,
                       .num_tokens = request.num_tokens,
                       .miss_tokens = Account::miss_tokens(request, expected_blocks),
                       .prompt = Account::name_of_prompt(request)},
                      [&](std::vector<PrefixHash>& prefixes) {
                        return RoutedPrefixes::append_kept(request.prefixes, peer_limits::kPrefixes, prefixes);
                      });
  }

  void view_workers(std::vector<WorkerView>& views, std::span<const std::uint8_t> eligible = {}) const {
    views.assign(options_.workers.size(), WorkerView{});
    for (WorkerId w = 0; w < views.size(); ++w) {
      const WorkerLoad load = loads_.get(w);
      views[w].kv_usage = load.kv_usage;
      views[w].waiting = load.waiting;
    }
    std::vector<std::uint8_t>& available = scratch().available;
    find_available(eligible, available);
    for (WorkerId w = 0; w < views.size(); ++w) views[w].available = available[w] != 0;
  }

  // Who may be chosen; where all of those are lost, all of those.
  void find_available(std::span<const std::uint8_t> eligible, std::vector<std::uint8_t>& available) const {
    const bool none_enabled = num_disabled_.load(std::memory_order_relaxed) == options_.workers.size();
    const auto may_serve = [&](WorkerId w) {
      return (eligible.empty() || eligible[w] != 0) && (none_enabled || !disabled_[w].load(std::memory_order_relaxed));
    };
    available.assign(options_.workers.size(), 0);
    bool any_available = false;
    {
      const std::shared_lock lock(connections_mutex_);
      for (WorkerId w = 0; w < available.size(); ++w) {
        const WorkerState state = connections_ ? connections_->state(w) : WorkerState::kUp;
        available[w] = may_serve(w) && state != WorkerState::kDown && state != WorkerState::kSuspect;
        any_available = any_available || available[w] != 0;
      }
    }
    for (WorkerId w = 0; w < available.size() && !any_available; ++w) available[w] = may_serve(w);
  }

  WorkerId next_in_turn(std::span<const std::uint8_t> eligible = {}) {
    std::vector<WorkerView>& views = scratch().views;
    std::vector<double>& scores = scratch().scores;
    view_workers(views, eligible);
    scores.resize(views.size());
    return round_robin_->choose({1, options_.block_size}, views, random_, scores);
  }

  void on_failure(const std::exception& error, std::size_t num_requests) {
    if (fallbacks_.fetch_add(num_requests, std::memory_order_relaxed) == 0) {
      notices_.post(Notice::Level::kError,
                    std::string("a decision failed (") + error.what() + "): requests go round robin while it does");
    }
  }

  void count(WorkerId worker) {
    loads_.add_waiting(worker);
    decisions_[worker].fetch_add(1, std::memory_order_relaxed);
  }

  RouterOptions options_;  // constant but for the endpoints, which connections_mutex_ guards
  std::unique_ptr<Policy> policy_;
  std::unique_ptr<Policy> round_robin_;
  SharedRandom random_;
  PrefixIndex index_;
  std::deque<FencedSink> sinks_;  // the workers' ways into the index
  LoadTable loads_;
  std::unique_ptr<Account> account_;  // null where the policy uses none
  Notices notices_;
  std::optional<RouterReplicaHost> replica_host_;
  std::unique_ptr<Replicas> replicas_;  // null where there are none
  SelfCheck check_{options_.workers.size(), options_.block_size, notices_, [this](WorkerId w) { return evidence(w); }};
  LatencyHistogram latency_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> decisions_;
  std::atomic<std::uint64_t> fallbacks_{0};
  std::unique_ptr<std::atomic<bool>[]> disabled_;
  std::atomic<std::size_t> num_disabled_{0};

  std::mutex snapshots_mutex_;
  std::map<std::string, WorkerSnapshot> snapshots_;  // of workers that have not come yet, by their identities

  std::mutex lifecycle_mutex_;                   // start() and stop() one at a time
  mutable std::shared_mutex connections_mutex_;  // guards the pointer, and the links behind it
  std::unique_ptr<Connections> connections_;
};

Router::Router(RouterOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Router::~Router() = default;

void Router::start(bool kv_events) {
  impl_->start(kv_events);
}
void Router::stop() {
  impl_->stop();
}
bool Router::running() const {
  return impl_->running();
}
std::size_t Router::num_workers() const {
  return impl_->options().workers.size();
}
std::size_t Router::block_size() const {
  return impl_->options().block_size;
}
const std::string& Router::policy() const {
  return impl_->options().policy;
}
Choice Router::choose(std::span<const LocalHash> blocks, std::size_t num_tokens) {
  return impl_->choose({blocks, num_tokens});
}
Choice Router::choose_for_tokens(std::span<const TokenId> tokens, NamespaceHash ns) {
  return impl_->choose_for_tokens(tokens, ns);
}
Decision Router::explain(std::span<const LocalHash> blocks, std::size_t num_tokens) {
  return explain(RouteQuery{blocks, num_tokens});
}
Decision Router::explain(const RouteQuery& query) {
  Decision decision;
  const Choice choice = impl_->choose(query, &decision);
  decision.choice = choice;
  return decision;
}
void Router::choose_batch(std::span<const BatchRequest> requests, std::span<Choice> choices) {
  impl_->choose_batch(requests, choices);
}
void Router::choose_batch_for_tokens(std::span<const std::span<const TokenId>> requests, NamespaceHash ns,
                                     std::span<Choice> choices) {
  impl_->choose_batch_for_tokens(requests, ns, choices);
}
WorkerId Router::round_robin() {
  return impl_->round_robin();
}
Decision Router::explain_for_tokens(std::span<const TokenId> tokens, NamespaceHash ns,
                                    std::span<const std::uint8_t> eligible) {
  Decision decision;
  const Choice choice = impl_->choose_for_tokens(tokens, ns, &decision, eligible);
  decision.choice = choice;
  return decision;
}
bool Router::first_token(Ticket ticket) {
  return impl_->first_token(ticket);
}
bool Router::complete(Ticket ticket, const Completion& completion) {
  return impl_->complete(ticket, completion);
}
void Router::report_hit(WorkerId worker, const HitReport& report) {
  impl_->report_hit(worker, report);
}
void Router::report_hits(WorkerId worker, const HitTotals& totals) {
  impl_->report_hits(worker, totals);
}
void Router::set_worker(WorkerId worker, WorkerEndpoints endpoints) {
  impl_->set_worker(worker, std::move(endpoints));
}
void Router::enable(WorkerId worker, bool enabled) {
  impl_->enable(worker, enabled);
}
void Router::reset(std::optional<WorkerId> worker, Reset kind) {
  impl_->forget_snapshots();
  impl_->reset(worker, kind);
}
std::string Router::snapshot() {
  return impl_->snapshot();
}
std::size_t Router::warm_start(std::span<const std::byte> snapshot) {
  return impl_->warm_start(snapshot);
}
RouterStatus Router::status() const {
  return impl_->status();
}
std::optional<RouterNotice> Router::next_notice(std::chrono::milliseconds timeout) {
  return impl_->next_notice(timeout);
}
PrefixIndex& Router::index() {
  return impl_->index();
}
LoadTable& Router::loads() {
  return impl_->loads();
}

}  // namespace kvrouter
