// Keeps a worker's event stream complete: asks for replays when it is behind, and now and then when it is not, since
// the loss of a worker's last batch shows in nothing else.  Used by the network thread; never waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "events/kv_event_stream.h"
#include "router/replay_client.h"

namespace kvrouter {

class Replay {
 public:
  using Clock = std::chrono::steady_clock;

  // REQUIRES: stream outlives the Replay and was made for replay.
  Replay(zmq::context_t& context, const std::string& endpoint, KvEventStream& stream)
      : client_(context, endpoint), stream_(stream) {}

  // Reads one answer; false if there is none, or the connection was dropped.
  bool read(Clock::time_point now);
  // kv_connected: whether the worker's live events are connected, and since when that is (not) so.
  void tick(Clock::time_point now, bool kv_connected, Clock::time_point changed_at);
  // A live batch came: as long as they do, gaps show by themselves.
  void on_live(Clock::time_point now) { heard_at_ = now; }
  void on_disconnected();

  zmq::socket_t* socket() { return client_.socket(); }
  bool socket_changed() { return client_.socket_changed(); }
  const std::string& endpoint() const { return client_.endpoint(); }
  bool available() const { return available_; }
  std::uint64_t failures() const { return failures_; }
  // True once, when replays have turned out not to be had.
  bool take_unavailable() { return std::exchange(tell_unavailable_, false); }

 private:
  void ask(Clock::time_point now);
  void act(ReplayStep step, Clock::time_point now);
  void fail(Clock::time_point now);

  ReplayClient client_;
  KvEventStream& stream_;
  bool asking_ = false;
  bool progress_ = false;  // a batch was applied since it was asked for
  std::uint64_t answers_ = 0;
  int attempts_ = 0;    // in a row, without progress
  int connecting_ = 0;  // tries of the connection
  bool available_ = true;
  bool told_unavailable_ = false;
  bool tell_unavailable_ = false;
  std::uint64_t failures_ = 0;
  Clock::time_point heard_at_{};     // live, or by a replay
  Clock::time_point answered_at_{};  // the last answer to what is asked now
  Clock::time_point not_before_{};   // of the next request
};

}  // namespace kvrouter
