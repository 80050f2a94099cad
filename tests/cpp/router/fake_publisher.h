// The two publishers of a worker, on ports of their own: what the router hears when a worker speaks.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <zmq.hpp>

#include "kvrouter/router.h"

namespace kvrouter::testing {

class Publisher {
 public:
  explicit Publisher(zmq::context_t& context, const std::string& endpoint = "tcp://127.0.0.1:*")
      : socket_(context, zmq::socket_type::pub) {
    socket_.set(zmq::sockopt::linger, 0);
    // The port of a publisher that was just closed may take the system a moment to free.
    for (int attempt = 0;; ++attempt) {
      try {
        socket_.bind(endpoint);
        break;
      } catch (const zmq::error_t&) {
        if (attempt == 100) throw;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    }
  }

  std::string endpoint() const { return socket_.get(zmq::sockopt::last_endpoint); }

  void send_load(const std::string& json) { socket_.send(zmq::buffer(json), zmq::send_flags::none); }

  void send_batch(std::uint64_t sequence, const std::string& payload) {
    const std::uint64_t big_endian = __builtin_bswap64(sequence);
    send_frames({"kv", std::string(reinterpret_cast<const char*>(&big_endian), 8), payload});
  }

  void send_frames(const std::vector<std::string>& frames) {
    for (std::size_t i = 0; i < frames.size(); ++i) {
      socket_.send(zmq::buffer(frames[i]), i + 1 < frames.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }

 private:
  zmq::socket_t socket_;
};

// A port that refuses connections, and that nobody else gets meanwhile: bound, but not listened at.  That of a
// publisher that was just closed may still accept.
class UnusedPort {
 public:
  UnusedPort() : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address_;
    if (socket_ < 0 || ::bind(socket_, reinterpret_cast<sockaddr*>(&address_), size) != 0 ||
        ::getsockname(socket_, reinterpret_cast<sockaddr*>(&address_), &size) != 0) {
      throw std::runtime_error("no port to be had");
    }
  }
  ~UnusedPort() { ::close(socket_); }
  UnusedPort(const UnusedPort&) = delete;
  UnusedPort& operator=(const UnusedPort&) = delete;

  std::string endpoint() const { return "tcp://127.0.0.1:" + std::to_string(ntohs(address_.sin_port)); }

 private:
  int socket_;
  sockaddr_in address_{};
};

// Waits until `condition` holds, ten seconds at most; whether it came to hold.
template <typename Condition>
bool eventually(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace kvrouter::testing
