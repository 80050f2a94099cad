// A worker's event publisher with its replay socket, whose live messages can be lost on the way.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "router/fake_publisher.h"

namespace kvrouter::testing {

class ReplayingWorker {
 public:
  struct Endpoints {
    std::string kv = "tcp://127.0.0.1:*";
    std::string replay = "tcp://127.0.0.1:*";
  };

  ReplayingWorker(zmq::context_t& context, std::size_t buffer, const Endpoints& at)
      : buffer_size_(buffer), pub_(context, at.kv), router_(context, zmq::socket_type::router) {
    router_.set(zmq::sockopt::linger, 0);
    router_.set(zmq::sockopt::sndhwm, 0);
    for (int attempt = 0;; ++attempt) {
      try {
        router_.bind(at.replay);
        break;
      } catch (const zmq::error_t&) {
        if (attempt == 100) throw;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    }
    replay_endpoint_ = router_.get(zmq::sockopt::last_endpoint);
    thread_ = std::thread([this] { serve(); });
  }
  ~ReplayingWorker() {
    stop_ = true;
    thread_.join();
  }

  Endpoints endpoints() const { return {pub_.endpoint(), replay_endpoint_}; }

  void publish(const std::string& payload, bool lost = false) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t sequence = next_++;
    buffer_.emplace_back(sequence, payload);
    if (buffer_.size() > buffer_size_) buffer_.pop_front();
    if (!lost) pub_.send_batch(sequence, payload);
  }

  // What it answers with instead of its buffer.
  using Answer = std::function<void(zmq::socket_t&, const std::string& client)>;
  void lie(Answer answer) {
    const std::lock_guard lock(mutex_);
    lie_ = std::move(answer);
  }
  int requests() const { return requests_; }

  static void send(zmq::socket_t& socket, const std::string& client, std::uint64_t sequence,
                   const std::string& payload) {
    const std::uint64_t number = __builtin_bswap64(sequence);
    socket.send(zmq::buffer(client), zmq::send_flags::sndmore);
    socket.send(zmq::message_t(), zmq::send_flags::sndmore);
    socket.send(zmq::message_t(), zmq::send_flags::sndmore);
    socket.send(zmq::buffer(&number, sizeof number), zmq::send_flags::sndmore);
    socket.send(zmq::buffer(payload), zmq::send_flags::none);
  }

 private:
  void serve() {
    router_.set(zmq::sockopt::rcvtimeo, 10);
    while (!stop_) {
      zmq::message_t client, empty, start;
      if (!router_.recv(client) || !router_.recv(empty) || !router_.recv(start)) continue;
      std::uint64_t first = 0;
      std::memcpy(&first, start.data(), sizeof first);
      first = __builtin_bswap64(first);
      const std::lock_guard lock(mutex_);
      ++requests_;
      if (lie_) {
        lie_(router_, client.to_string());
        continue;
      }
      for (const auto& [sequence, payload] : buffer_) {
        if (sequence >= first) send(router_, client.to_string(), sequence, payload);
      }
      send(router_, client.to_string(), UINT64_MAX, "");
    }
  }

  const std::size_t buffer_size_;
  Publisher pub_;
  zmq::socket_t router_;
  std::string replay_endpoint_;
  std::mutex mutex_;
  std::deque<std::pair<std::uint64_t, std::string>> buffer_;
  std::uint64_t next_ = 0;
  Answer lie_;
  std::atomic<int> requests_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace kvrouter::testing
