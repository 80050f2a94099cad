#include "router/worker_link.h"

#include <array>
#include <cstring>
#include <utility>

#include "replica/message.h"
#include "router/worker_socket.h"

namespace kvrouter {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int kMessagesPerTurn = 256;
constexpr int kReplayMessagesPerTurn = 64;
// The two channels of a worker that dies are lost one after the other; wait for both before saying which case it is.
constexpr milliseconds kLossGrace{300};
constexpr seconds kChannelLossGrace{3};
constexpr seconds kTellInterval{10};
constexpr std::uint64_t kDecisionsWithoutEvents = 100;
constexpr seconds kNoEventsGrace{30};

}  // namespace

WorkerLink::WorkerLink(zmq::context_t& zmq, WorkerId worker, const WorkerEndpoints& endpoints, const Context& context)
    : worker_(worker),
      endpoints_(endpoints),
      context_(context),
      stream_(context.options.block_size, context.sink,
              context.kv_events && !endpoints.kv_events.empty() && !endpoints.replay.empty()),
      resets_(context.sink.resets()) {
  if (context.kv_events && !endpoints.kv_events.empty()) {
    kv_.emplace(zmq, Channel::Kind::kKvEvents, endpoints.kv_events, context.first_channel);
  }
  if (kv_ && !endpoints.replay.empty()) replay_.emplace(zmq, endpoints.replay, stream_);
  if (!endpoints.load.empty()) {
    load_.emplace(zmq, Channel::Kind::kLoad, endpoints.load, context.first_channel + 1);
  }
}

bool WorkerLink::resume(WorkerSnapshot snapshot) {
  if (!replay_) return false;
  stream_.resume(snapshot.position, std::move(snapshot.chains));
  return true;
}

std::optional<WorkerSnapshot> WorkerLink::capture(const PrefixIndex& index) {
  const std::uint64_t resets = context_.sink.resets();
  check_resets();
  // What waits to be confirmed may wait once more: a router that starts and ends at once loses nothing.
  if (const auto& waiting = stream_.resumed()) {
    return WorkerSnapshot{identity_of(endpoints_), waiting->position, waiting->chains};
  }
  const auto position = stream_.position();
  // Behind a fence the index is empty, and nobody who reads the snapshot would know what is to be kept out.
  if (!position || context_.sink.fenced()) return std::nullopt;
  WorkerSnapshot snapshot{identity_of(endpoints_), *position, index.worker_chains(worker_)};
  if (snapshot.identity.empty() || context_.sink.resets() != resets) return std::nullopt;
  return snapshot;
}

void WorkerLink::read_kv_events() {
  for (int i = 0; i < kMessagesPerTurn && takes_kv_events() && read_kv_event(); ++i) {
  }
  publish_status();
}

bool WorkerLink::read_kv_event() {
  std::array<zmq::message_t, 3> part;
  const std::size_t parts = receive_parts(kv_->socket(), part);
  if (parts == 0) return false;
  if (parts == 3 && part[1].size() == sizeof(std::uint64_t)) {
    on_kv_message(part[1], part[2]);
  } else {
    ++malformed_kv_messages_;
  }
  return true;
}

void WorkerLink::on_kv_message(const zmq::message_t& sequence, const zmq::message_t& payload) {
  std::uint64_t number = 0;
  std::memcpy(&number, sequence.data(), sizeof number);
  number = __builtin_bswap64(number);
  const bool first = !replay_ && !stream_.last_sequence();
  check_resets();
  stream_.on_batch(number, {static_cast<const std::byte*>(payload.data()), payload.size()});
  hear();
  if (replay_) replay_->on_live(Clock::now());
  if (first && number > 0 && !told_late_start_) {
    told_late_start_ = true;
    tell(Notice::Level::kInfo, "has published " + std::to_string(number) +
                                   " batches of KV events before the router listened; what it cached then is unknown");
  }
}

void WorkerLink::check_resets() {
  const std::uint64_t resets = context_.sink.resets();
  if (resets == resets_) return;
  resets_ = resets;
  stream_.on_reset();
}

void WorkerLink::read_replay() {
  for (int i = 0; i < kReplayMessagesPerTurn; ++i) {
    check_resets();
    if (!replay_->read(Clock::now())) break;
  }
  publish_status();
}

bool WorkerLink::polling_changed() {
  const bool kv_changed = std::exchange(polled_kv_, takes_kv_events()) != takes_kv_events();
  return (replay_ && replay_->socket_changed()) || kv_changed;
}

void WorkerLink::read_load() {
  zmq::message_t newest;
  bool any = false;
  for (int i = 0; i < kMessagesPerTurn; ++i) {
    zmq::message_t message;
    const std::size_t parts = receive_parts(load_->socket(), {&message, 1});
    if (parts == 0) break;
    if (parts == 1) {
      newest = std::move(message);
      any = true;
      continue;
    }
    ++malformed_load_messages_;
    load_error_ = "a load message has one part: are these KV events?";
  }
  if (any) read_load_message(newest.to_string_view());
  publish_status();
}

void WorkerLink::read_load_message(std::string_view text) {
  const LoadOrError result = parse_load_message(text);
  if (result.ok()) {
    context_.loads.update(worker_, result.load);
    hear();
    ++load_messages_;
  } else {
    ++malformed_load_messages_;
    load_error_ = result.error;
  }
}

void WorkerLink::update_connections() {
  if (kv_) {
    const bool was_connected = kv_->connected();
    if (kv_->update()) {
      // What is still queued was said by the connection that is lost: it is read before the belief in it ends.  While
      // it waits for a replay it is dropped instead: if the worker lives, the replay brings it.
      while (takes_kv_events() && read_kv_event()) {
      }
      zmq::message_t dropped;
      while (kv_->socket().recv(dropped, zmq::recv_flags::dontwait)) {
      }
      check_resets();
      stream_.on_disconnected();
      if (replay_) replay_->on_disconnected();
    }
    kv_connected_.store(kv_->connected(), std::memory_order_relaxed);
    if (!was_connected && kv_->connected()) told_kv_lost_ = false;
  }
  if (load_) {
    load_->update();
    load_connected_.store(load_->connected(), std::memory_order_relaxed);
    if (load_->connected()) told_load_lost_ = false;
  }
  publish_status();
}

void WorkerLink::on_metrics(const LoadOrError& result) {
  if (result.ok()) {
    context_.loads.update(worker_, result.load);
    metrics_ever_ok_.store(true, std::memory_order_relaxed);
    probe_answered_.store(true, std::memory_order_relaxed);
  }
  metrics_ok_.store(result.ok(), std::memory_order_relaxed);
}

void WorkerLink::tick(Clock::time_point now) {
  if (kv_) kv_->redial_if_given_up(now);
  if (load_) load_->redial_if_given_up(now);
  if (replay_) {
    check_resets();
    replay_->tick(now, kv_->connected(), kv_->changed_at());
    publish_status();
  }
  update_state(now);
  suspect_silent(now);
  tell_silence(now);
  tell_trouble(now);
}

void WorkerLink::hear() {
  heard_decisions_ = context_.decisions.load(std::memory_order_relaxed);
  silent_since_ = {};
  if (state() != WorkerState::kSuspect) return;
  state_.store(WorkerState::kUp, std::memory_order_relaxed);
  tell(Notice::Level::kInfo, "speaks again: it gets requests again");
}

void WorkerLink::suspect_silent(Clock::time_point now) {
  if (probe_answered_.exchange(false, std::memory_order_relaxed)) hear();
  if (state() == WorkerState::kSuspect) {
    if (now - suspected_at_ < 2 * context_.options.suspect_after) return;
    heard_decisions_ = context_.decisions.load(std::memory_order_relaxed);
    silent_since_ = {};
    state_.store(WorkerState::kUp, std::memory_order_relaxed);
    return;
  }
  if (state() != WorkerState::kUp || !load_ || !load_->connected() || load_messages_ == 0) return;
  if (context_.decisions.load(std::memory_order_relaxed) == heard_decisions_) return;
  if (silent_since_ == Clock::time_point{}) silent_since_ = now;
  if (now - silent_since_ < context_.options.suspect_after) return;
  suspected_at_ = now;
  state_.store(WorkerState::kSuspect, std::memory_order_relaxed);
  if (!may_tell(now, suspected_told_at_)) return;
  tell(Notice::Level::kWarning,
       "was sent requests and has said nothing for " + std::to_string(context_.options.suspect_after.count()) +
           " ms: requests go to the other workers until it speaks" +
           (endpoints_.http.empty() ? " (or for twice as long)" : ", or its /metrics answers"));
}

void WorkerLink::update_state(Clock::time_point now) {
  const bool kv_up = kv_ && kv_->connected();
  const bool load_up = load_ && load_->connected();
  const bool metrics_up = metrics_ok_.load(std::memory_order_relaxed);
  const bool ever = (kv_ && kv_->ever_connected()) || (load_ && load_->ever_connected()) ||
                    metrics_ever_ok_.load(std::memory_order_relaxed);
  const WorkerState before = state();
  if (kv_up || load_up || metrics_up) {
    if (before != WorkerState::kUp && before != WorkerState::kSuspect) {
      if (before == WorkerState::kDown) {
        tell(Notice::Level::kInfo, "is back, with an empty cache as far as is known");
      } else if (told_silence_) {
        tell(Notice::Level::kInfo, "has been reached");
      }
      state_.store(WorkerState::kUp, std::memory_order_relaxed);
    }
    return;
  }
  // Also one that was up and lost between two ticks, and so never seen up here.
  if (before == WorkerState::kDown || !ever) return;
  const Clock::time_point lost =
      std::max(kv_ ? kv_->changed_at() : Clock::time_point{}, load_ ? load_->changed_at() : Clock::time_point{});
  if (now - lost < kLossGrace) return;
  state_.store(WorkerState::kDown, std::memory_order_relaxed);
  context_.loads.update(worker_, {});
  told_kv_lost_ = told_load_lost_ = true;
  tell(Notice::Level::kWarning,
       "is gone: its connections are closed. Requests go to the other workers until it is back");
}

void WorkerLink::tell_silence(Clock::time_point now) {
  if (!told_silence_ && now - context_.started >= context_.options.startup_grace) {
    told_silence_ = true;
    const bool no_kv = kv_ && !kv_->ever_connected();
    const bool no_load = load_ && !load_->ever_connected();
    const bool metrics = metrics_ever_ok_.load(std::memory_order_relaxed);
    const std::string kv_help =
        "start it with --kv-events-config (kvrouter.vllm.kv_events_config gives it), or check "
        "base_kv_events_port, worker_ports and worker_addresses";
    const std::string load_help =
        "start it with the kvrouter package installed and KVROUTER_LOAD_ENDPOINT set, or "
        "check base_metrics_port";
    if (no_kv && no_load && !metrics) {
      tell(Notice::Level::kWarning, "cannot be reached: nothing answers at " + kv_->endpoint() +
                                        " (KV events) nor at " + load_->endpoint() +
                                        " (load). Until then it gets requests by turns. " +
                                        "If it is still starting, it will be found; otherwise " + kv_help);
    } else {
      if (no_kv) {
        tell(Notice::Level::kWarning, "publishes no KV events at " + kv_->endpoint() +
                                          ": it is routed to by its load alone. To change that, " + kv_help);
      }
      if (no_load) {
        const std::string instead =
            metrics ? ": its load is read from " + endpoints_.http + "/metrics instead. To change that, " + load_help
                    : ": it is taken for idle but for what was sent to it. To change that, " + load_help +
                          ", or give its URL (worker_urls) for /metrics to be read";
        tell(Notice::Level::kWarning, "publishes no load at " + load_->endpoint() + instead);
      }
    }
  }
  if (!told_no_events_ && kv_ && kv_->connected() && now - kv_->changed_at() >= kNoEventsGrace &&
      stream_.event_counts().batches == 0 &&
      context_.decisions.load(std::memory_order_relaxed) >= kDecisionsWithoutEvents) {
    told_no_events_ = true;
    tell(Notice::Level::kWarning, "was sent " + std::to_string(kDecisionsWithoutEvents) +
                                      " requests or more and has published no KV event: are prefix caching and "
                                      "enable_kv_cache_events on, and do prompts fill a block of " +
                                      std::to_string(context_.options.block_size) + " tokens?");
  }
  if (state() != WorkerState::kUp) return;
  const auto lost = [&](const std::optional<Channel>& channel) {
    return channel && channel->ever_connected() && !channel->connected() &&
           now - channel->changed_at() >= kChannelLossGrace;
  };
  if (!told_kv_lost_ && lost(kv_)) {
    told_kv_lost_ = true;
    tell(Notice::Level::kWarning, "has closed its KV events at " + kv_->endpoint() +
                                      ": its cache is unknown, and it is routed to by its load alone");
  }
  if (!told_load_lost_ && lost(load_)) {
    told_load_lost_ = true;
    tell(Notice::Level::kWarning,
         "has closed its load publisher at " + load_->endpoint() + ": its last load counts until it is back");
  }
}

void WorkerLink::tell_trouble(Clock::time_point now) {
  const std::size_t announced = stream_.mismatched_block_size();
  if (announced != told_block_size_) {
    told_block_size_ = announced;
    tell(Notice::Level::kError, "has KV blocks of " + std::to_string(announced) +
                                    " tokens, the router's block_size is " +
                                    std::to_string(context_.options.block_size) +
                                    ": its KV events cannot be used. Set block_size (router) and --block-size (vLLM) "
                                    "to the same value");
  }
  const KvEventStreamCounts& counts = stream_.counts();
  if (replay_ && replay_->take_unavailable()) {
    tell(Notice::Level::kWarning, "answers no request for a replay of its KV events at " + replay_->endpoint() +
                                      ": what is lost is learnt anew. Give vLLM's --kv-events-config a replay_endpoint "
                                      "and the router the same address, or set replay to false");
  }
  if (counts.too_short_buffers > told_short_buffers_ && may_tell(now, short_buffers_told_at_)) {
    tell(Notice::Level::kWarning,
         "no longer has the KV events that the router lacks: what it caches is learnt anew, "
         "and until it clears its cache it is routed to by its load and what is known. A "
         "larger buffer_steps in its --kv-events-config keeps more");
    told_short_buffers_ = counts.too_short_buffers;
  }
  if (counts.gaps > told_gaps_ && may_tell(now, gaps_told_at_)) {
    tell(Notice::Level::kWarning,
         "has a gap in its KV events (" + std::to_string(counts.missed_batches) + " batches missed so far): " +
             (replay_ && replay_->available() ? "they are asked for again"
                                              : "what it caches is unknown and is learnt anew"));
    told_gaps_ = counts.gaps;
  }
  const std::uint64_t malformed = counts.malformed + malformed_kv_messages_;
  if (malformed > told_malformed_ && may_tell(now, malformed_told_at_)) {
    tell(Notice::Level::kWarning, "sent KV events that cannot be read (" + std::to_string(malformed) + " so far)" +
                                      (stream_.last_error().empty() ? "" : ": " + stream_.last_error()));
    told_malformed_ = malformed;
  }
  if (malformed_load_messages_ > told_malformed_load_ && may_tell(now, malformed_load_told_at_)) {
    tell(Notice::Level::kWarning, "sent load messages that cannot be read (" +
                                      std::to_string(malformed_load_messages_) + " so far): " + load_error_);
    told_malformed_load_ = malformed_load_messages_;
  }
}

bool WorkerLink::may_tell(Clock::time_point now, Clock::time_point& last) const {
  if (last != Clock::time_point{} && now - last < kTellInterval) return false;
  last = now;
  return true;
}

void WorkerLink::tell(Notice::Level level, const std::string& text) {
  context_.notices.post(level, "worker " + std::to_string(worker_) + " " + text);
}

void WorkerLink::publish_status() {
  const std::lock_guard lock(status_mutex_);
  status_.events = stream_.event_counts();
  status_.gaps = stream_.counts().gaps;
  status_.missed_batches = stream_.counts().missed_batches;
  status_.duplicates = stream_.counts().duplicates;
  status_.restarts = stream_.counts().restarts;
  status_.knowledge = stream_.behind()  ? CacheKnowledge::kRecovering
                      : stream_.whole() ? CacheKnowledge::kWhole
                                        : CacheKnowledge::kPartial;
  status_.resyncs = stream_.counts().resyncs;
  status_.replayed_batches = stream_.counts().replayed_batches;
  status_.warm_starts = stream_.counts().resumed;
  status_.failed_replays = replay_ ? replay_->failures() : 0;
  status_.load_messages = load_messages_;
  status_.malformed_load_messages = malformed_load_messages_;
}

void WorkerLink::describe(WorkerStatus& status) const {
  {
    const std::lock_guard lock(status_mutex_);
    status = status_;
  }
  status.state = state();
  status.load_source = load_connected_.load(std::memory_order_relaxed) ? LoadSource::kMessages
                       : metrics_ok_.load(std::memory_order_relaxed)   ? LoadSource::kMetrics
                                                                       : LoadSource::kNone;
}

}  // namespace kvrouter
