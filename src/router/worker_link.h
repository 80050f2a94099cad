// All that the router's network thread knows of one worker: its channels, its event stream, and what of its state has
// been told to the operator already.  Used by that thread alone, except where a method says otherwise.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "events/kv_event_stream.h"
#include "kvrouter/router.h"
#include "replica/snapshot.h"
#include "router/channel.h"
#include "router/fenced_sink.h"
#include "router/notices.h"
#include "router/replay.h"

namespace kvrouter {

class WorkerLink {
 public:
  using Clock = Channel::Clock;

  struct Context {
    const RouterOptions& options;
    FencedSink& sink;
    LoadTable& loads;
    Notices& notices;
    const std::atomic<std::uint64_t>& decisions;
    bool kv_events;
    std::size_t first_channel;  // number of its first channel, unique in the context as the next one is
    Clock::time_point started;
  };

  WorkerLink(zmq::context_t& zmq, WorkerId worker, const WorkerEndpoints& endpoints, const Context& context);

  // What is known of it from before, see KvEventStream::resume().  False if that cannot be confirmed, as it replays
  // nothing: then it is as if nothing were known.
  bool resume(WorkerSnapshot snapshot);
  // All that is known of what it caches, at one place of its event stream; nothing while that is not to be had.
  std::optional<WorkerSnapshot> capture(const PrefixIndex& index);

  // Each reads what has arrived, up to a bound, so that no worker can starve the others.
  void read_kv_events();
  void read_load();
  void update_connections();
  // Looks at the clock: silence, loss and recovery become notices here.
  void tick(Clock::time_point now);

  // False while live batches wait for a replay: their socket is not to be polled then.
  bool takes_kv_events() const { return !stream_.behind(); }
  // The socket of a replay, or null; and whether it, or takes_kv_events(), has changed since this was last asked.
  zmq::socket_t* replay_socket() { return replay_ ? replay_->socket() : nullptr; }
  bool polling_changed();
  void read_replay();

  Channel* kv_channel() { return kv_ ? &*kv_ : nullptr; }
  Channel* load_channel() { return load_ ? &*load_ : nullptr; }

  // From any thread.
  WorkerState state() const { return state_.load(std::memory_order_relaxed); }
  bool hears_kv_events() const { return kv_connected_.load(std::memory_order_relaxed); }
  // Of a suspect they are the probe: one that answers is slow, not dead.
  bool wants_metrics() const {
    return !load_connected_.load(std::memory_order_relaxed) || state() == WorkerState::kSuspect;
  }
  void on_metrics(const LoadOrError& result);
  void describe(WorkerStatus& status) const;

 private:
  // Reads one message; false if there is none.
  bool read_kv_event();
  void check_resets();
  void on_kv_message(const zmq::message_t& sequence, const zmq::message_t& payload);
  void read_load_message(std::string_view text);
  void publish_status();
  void hear();
  void suspect_silent(Clock::time_point now);
  void update_state(Clock::time_point now);
  void tell_silence(Clock::time_point now);
  void tell_trouble(Clock::time_point now);
  // True once an interval for each kind of trouble (`last` is when it was told last).
  bool may_tell(Clock::time_point now, Clock::time_point& last) const;
  void tell(Notice::Level level, const std::string& text);

  WorkerId worker_;
  WorkerEndpoints endpoints_;
  Context context_;
  KvEventStream stream_;
  std::optional<Replay> replay_;
  std::uint64_t resets_;  // of the sink, as far as the stream has been told
  bool polled_kv_ = true;
  std::optional<Channel> kv_;
  std::optional<Channel> load_;

  std::atomic<WorkerState> state_{WorkerState::kConnecting};
  std::atomic<bool> kv_connected_{false};
  std::atomic<bool> load_connected_{false};
  std::atomic<bool> metrics_ok_{false};
  std::atomic<bool> metrics_ever_ok_{false};
  std::atomic<bool> probe_answered_{false};

  // An idle worker says nothing, so silence counts only from the first request on that it was sent after its last word.
  std::uint64_t heard_decisions_ = 0;
  Clock::time_point silent_since_{};  // {}: nothing was sent to it since
  Clock::time_point suspected_at_{};

  std::uint64_t load_messages_ = 0;
  std::uint64_t malformed_load_messages_ = 0;
  std::uint64_t malformed_kv_messages_ = 0;
  std::string load_error_;

  // What has been told, and up to which count.
  bool told_silence_ = false;
  bool told_no_events_ = false;
  bool told_late_start_ = false;
  bool told_kv_lost_ = false;
  bool told_load_lost_ = false;
  std::size_t told_block_size_ = 0;
  std::uint64_t told_gaps_ = 0;
  std::uint64_t told_short_buffers_ = 0;
  std::uint64_t told_malformed_ = 0;
  std::uint64_t told_malformed_load_ = 0;
  Clock::time_point gaps_told_at_{}, short_buffers_told_at_{}, suspected_told_at_{}, malformed_told_at_{},
      malformed_load_told_at_{};

  mutable std::mutex status_mutex_;
  WorkerStatus status_;  // the counts, as of the last burst read
};

}  // namespace kvrouter
