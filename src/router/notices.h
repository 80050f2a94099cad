// What the router has to tell its operator: few, rate-limited lines, in a bounded queue.
//
// The C++ threads post; one consumer (the Python logger) waits.  Keeping the interpreter's lock out of the network
// thread is the reason that this is a queue and not a callback.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include "kvrouter/router.h"

namespace kvrouter {

using Notice = RouterNotice;

class Notices {
 public:
  static constexpr std::size_t kCapacity = 1024;  // the newest beyond it are dropped and counted

  void post(Notice::Level level, std::string text);
  // The next notice; nothing after `timeout`, or once closed and empty.
  std::optional<Notice> next(std::chrono::milliseconds timeout);
  // Wakes the consumer; what is queued can still be read.
  void close();
  void reopen();
  std::uint64_t dropped() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Notice> queue_;
  std::uint64_t dropped_ = 0;
  bool closed_ = false;
};

}  // namespace kvrouter
