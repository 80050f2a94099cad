// What the router's ZeroMQ sockets to a worker have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <zmq.hpp>

namespace kvrouter {

// A message that is longer is no event batch but an attack or a mistake; libzmq then drops the connection.
inline constexpr std::int64_t kMaxKvMessageBytes = 64 * 1024 * 1024;

// To be called before connect(): options count for connections made after they are set.
void set_worker_socket_options(zmq::socket_t& socket, const std::string& endpoint);

// Reads one message if there is one: the number of its parts, 0 if there is none.  Parts beyond `parts` are read and
// dropped.
std::size_t receive_parts(zmq::socket_t& socket, std::span<zmq::message_t> parts);

}  // namespace kvrouter
