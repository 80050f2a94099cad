// Publishes KV events as a vLLM worker does: batches on a PUB socket as (topic, sequence number, MessagePack payload),
// and a ROUTER socket that replays the last batches to who asks.
//
// Not thread-safe: one thread calls publish() and serve_replay(); replay is served between publishes, as in vLLM.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <zmq.hpp>

#include "sim/kv_events.h"

namespace kvrouter::sim {

struct EventPublisherOptions {
  std::string endpoint;         // bound; empty: nothing is published
  std::string replay_endpoint;  // bound; empty: no replay
  std::string topic = "kv";
  std::size_t replay_buffer = 10'000;  // batches
  bool array_layout = false;           // events as arrays, as vLLM up to 0.23 sent them; else as maps
  bool byte_hashes = false;            // block hashes as strings of 32 bytes; else as unsigned integers
};

// One event batch as it goes over the wire.  timestamp: seconds since the epoch.
std::string encode_batch(const KvEvents& events, std::int32_t block_size, double timestamp,
                         const EventPublisherOptions& options);

// Binds, and returns the endpoint with the port that was taken.  Throws std::runtime_error that begins with `option`.
std::string bind_socket(zmq::socket_t& socket, const std::string& endpoint, const std::string& option);

class EventPublisher {
 public:
  // Throws std::runtime_error, naming the option, when an endpoint cannot be bound.
  EventPublisher(zmq::context_t& context, const EventPublisherOptions& options, std::int32_t block_size);

  bool enabled() const { return !endpoint_.empty(); }
  const std::string& endpoint() const { return endpoint_; }
  const std::string& replay_endpoint() const { return replay_endpoint_; }

  void publish(const KvEvents& events, double timestamp);
  // Answers the replay requests that have arrived; never waits.
  void serve_replay();
  // Number of batches published, which is the sequence number of the next.
  std::uint64_t next_sequence() const { return next_sequence_; }
  // To poll for replay requests; null without replay.
  void* replay_handle() { return replay_endpoint_.empty() ? nullptr : replay_.handle(); }

 private:
  void replay_from(zmq::message_t& client, std::uint64_t start);

  EventPublisherOptions options_;
  std::int32_t block_size_;
  zmq::socket_t pub_;
  zmq::socket_t replay_;
  std::string endpoint_;
  std::string replay_endpoint_;
  std::uint64_t next_sequence_ = 0;
  std::deque<std::string> buffer_;  // payloads of the last batches, the newest is next_sequence_ - 1
};

}  // namespace kvrouter::sim
