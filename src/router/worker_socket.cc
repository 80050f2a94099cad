#include "router/worker_socket.h"

namespace kvrouter {
namespace {

// A peer whose machine is gone says nothing; without heartbeats the connection would look alive for hours.
constexpr int kHeartbeatMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10'000;

}  // namespace

void set_worker_socket_options(zmq::socket_t& socket, const std::string& endpoint) {
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::heartbeat_ivl, kHeartbeatMs);
  socket.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
  if (endpoint.find('[') != std::string::npos) socket.set(zmq::sockopt::ipv6, true);
}

std::size_t receive_parts(zmq::socket_t& socket, std::span<zmq::message_t> parts) {
  if (!socket.recv(parts[0], zmq::recv_flags::dontwait)) return 0;
  // The parts of a message arrive together: once the first is there, the rest can be read.
  std::size_t count = 1;
  zmq::message_t surplus;
  for (const zmq::message_t* last = &parts[0]; last->more(); ++count) {
    zmq::message_t& next = count < parts.size() ? parts[count] : surplus;
    if (!socket.recv(next, zmq::recv_flags::none)) break;
    last = &next;
  }
  return count;
}

}  // namespace kvrouter
