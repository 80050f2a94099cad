#include "router/replay_client.h"

#include <array>
#include <cstring>

#include "router/worker_socket.h"

namespace kvrouter {
namespace {

// Answers wait here while they are applied; what does not fit either, the worker drops, and it is asked for again.
constexpr int kHighWaterMark = 20'000;

}  // namespace

bool ReplayClient::ask(std::uint64_t first) {
  if (!socket_) {
    zmq::socket_t socket(context_, zmq::socket_type::dealer);
    set_worker_socket_options(socket, endpoint_);
    socket.set(zmq::sockopt::immediate, true);  // no request waits for a connection and is answered long after
    socket.set(zmq::sockopt::rcvhwm, kHighWaterMark);
    socket.set(zmq::sockopt::maxmsgsize, kMaxKvMessageBytes);
    socket.connect(endpoint_);
    socket_.emplace(std::move(socket));
    changed_ = true;
  }
  const std::uint64_t number = __builtin_bswap64(first);
  if (!socket_->send(zmq::message_t(), zmq::send_flags::sndmore | zmq::send_flags::dontwait)) return false;
  return socket_->send(zmq::buffer(&number, sizeof number), zmq::send_flags::dontwait).has_value();
}

ReplayClient::Answer ReplayClient::read() {
  Answer answer;
  if (!socket_) return answer;
  std::array<zmq::message_t, 4> part;
  const std::size_t parts = receive_parts(*socket_, part);
  if (parts == 0) return answer;
  answer.kind = Kind::kMalformed;
  if (parts != part.size() || part[0].size() != 0 || part[2].size() != sizeof answer.sequence) return answer;
  std::memcpy(&answer.sequence, part[2].data(), sizeof answer.sequence);
  answer.sequence = __builtin_bswap64(answer.sequence);
  answer.kind = answer.sequence == UINT64_MAX ? Kind::kEnd : Kind::kBatch;
  answer.payload = std::move(part[3]);
  return answer;
}

void ReplayClient::close() {
  changed_ = changed_ || socket_.has_value();
  socket_.reset();
}

}  // namespace kvrouter
