// One SUB connection to one publisher, and a monitor of its state.  Used by one thread.
#pragma once

#include <chrono>
#include <string>
#include <zmq.hpp>

namespace kvrouter {

class Channel {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Kind { kKvEvents, kLoad };

  // `number` is unique within the context.  Throws zmq::error_t, e.g. for an endpoint that is none.
  Channel(zmq::context_t& context, Kind kind, const std::string& endpoint, std::size_t number);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  zmq::socket_t& socket() { return socket_; }
  zmq::socket_t& monitor() { return monitor_; }
  const std::string& endpoint() const { return endpoint_; }

  bool connected() const { return connected_; }
  bool ever_connected() const { return ever_connected_; }
  Clock::time_point changed_at() const { return changed_at_; }

  // Reads what the monitor has to say; true if the connection was lost meanwhile (even if it is back already).
  bool update();
  // libzmq connects again after a loss, but never after a peer that broke the protocol: a worker whose port another
  // program had for a moment, or one that sent too long a message, would not be heard any more.  This connects anew.
  void redial_if_given_up(Clock::time_point now);

 private:
  std::string endpoint_;
  zmq::socket_t socket_;
  zmq::socket_t monitor_;
  bool connected_ = false;
  bool ever_connected_ = false;
  Clock::time_point changed_at_;
  Clock::time_point stirred_at_ = Clock::now();  // when libzmq last said that it is trying
};

}  // namespace kvrouter
