// Asks a vLLM worker to replay its KV events, and reads the answer.  Used by one thread; never waits.
//
// The wire: a DEALER sends (empty, first number wanted as 8 bytes, big-endian); the worker's ROUTER answers with one
// message (empty, topic, number, payload) a batch that it still has, and ends with the number 2^64 - 1.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <zmq.hpp>

namespace kvrouter {

class ReplayClient {
 public:
  enum class Kind { kNothing, kBatch, kEnd, kMalformed };
  struct Answer {
    Kind kind = Kind::kNothing;
    std::uint64_t sequence = 0;
    zmq::message_t payload;
    std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(payload.data()), payload.size()}; }
  };

  ReplayClient(zmq::context_t& context, std::string endpoint) : context_(context), endpoint_(std::move(endpoint)) {}

  const std::string& endpoint() const { return endpoint_; }
  // False when the connection does not stand (yet).
  bool ask(std::uint64_t first);
  Answer read();
  // Drops the connection: whatever else is on its way will not be read.
  void close();
  zmq::socket_t* socket() { return socket_ ? &*socket_ : nullptr; }
  // Whether socket() is another one than when this was last asked.
  bool socket_changed() { return std::exchange(changed_, false); }

 private:
  zmq::context_t& context_;
  std::string endpoint_;
  std::optional<zmq::socket_t> socket_;
  bool changed_ = false;
};

}  // namespace kvrouter
