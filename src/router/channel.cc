#include "router/channel.h"

#include <cstring>

#include "router/worker_socket.h"

namespace kvrouter {
namespace {

constexpr std::int64_t kMaxLoadMessageBytes = 64 * 1024;  // as kMaxKvMessageBytes
constexpr int kKvHighWaterMark = 100'000;                 // batches; what vLLM's publisher holds back as well
constexpr int kLoadHighWaterMark = 1000;
constexpr int kReconnectMs = 100;
constexpr int kReconnectMaxMs = 500;  // what a worker publishes before the router is back is lost to it
// The state of the connection, and the attempts to make one.
constexpr int kEvents = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CONNECTED |
                        ZMQ_EVENT_CONNECT_DELAYED | ZMQ_EVENT_CONNECT_RETRIED;
// Attempts are at most twice kReconnectMaxMs apart.  Longer silence: libzmq has given up.
constexpr std::chrono::milliseconds kGivenUp{3 * kReconnectMaxMs};

}  // namespace

Channel::Channel(zmq::context_t& context, Kind kind, const std::string& endpoint, std::size_t number)
    : endpoint_(endpoint), socket_(context, zmq::socket_type::sub), monitor_(context, zmq::socket_type::pair) {
  // Options count for connections made after they are set, so all of them come before connect().
  set_worker_socket_options(socket_, endpoint);
  socket_.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
  socket_.set(zmq::sockopt::reconnect_ivl_max, kReconnectMaxMs);
  if (kind == Kind::kLoad) {
    // The newest message is the only one of interest, but ZMQ_CONFLATE is not for what others send: a message of
    // several parts makes libzmq abort.
    socket_.set(zmq::sockopt::rcvhwm, kLoadHighWaterMark);
    socket_.set(zmq::sockopt::maxmsgsize, kMaxLoadMessageBytes);
  } else {
    socket_.set(zmq::sockopt::rcvhwm, kKvHighWaterMark);
    socket_.set(zmq::sockopt::maxmsgsize, kMaxKvMessageBytes);
  }
  socket_.set(zmq::sockopt::subscribe, "");

  const std::string address = "inproc://monitor-" + std::to_string(number);
  if (zmq_socket_monitor(socket_.handle(), address.c_str(), kEvents)) throw zmq::error_t();
  monitor_.set(zmq::sockopt::linger, 0);
  monitor_.connect(address);
  socket_.connect(endpoint);
}

Channel::~Channel() {
  // Else libzmq 4.3.4 does not free them when the connection breaks at this very moment.
  zmq_socket_monitor(socket_.handle(), nullptr, 0);
}

bool Channel::update() {
  bool lost = false;
  zmq::message_t event, address;
  while (monitor_.recv(event, zmq::recv_flags::dontwait)) {
    (void)monitor_.recv(address, zmq::recv_flags::dontwait);
    std::uint16_t kind = 0;
    if (event.size() < sizeof kind) continue;
    std::memcpy(&kind, event.data(), sizeof kind);
    stirred_at_ = Clock::now();
    if (kind != ZMQ_EVENT_HANDSHAKE_SUCCEEDED && kind != ZMQ_EVENT_DISCONNECTED) continue;
    const bool now_connected = kind == ZMQ_EVENT_HANDSHAKE_SUCCEEDED;
    // A dropped attempt to connect is no loss of a connection.
    if (now_connected == connected_) continue;
    lost = lost || !now_connected;
    connected_ = now_connected;
    ever_connected_ = ever_connected_ || now_connected;
    changed_at_ = stirred_at_;
  }
  return lost;
}

void Channel::redial_if_given_up(Clock::time_point now) {
  if (connected_ || now - stirred_at_ < kGivenUp) return;
  stirred_at_ = now;
  // Fails where libzmq has forgotten the connection already.
  (void)zmq_disconnect(socket_.handle(), endpoint_.c_str());
  socket_.connect(endpoint_);
}

}  // namespace kvrouter
