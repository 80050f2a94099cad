// A circuit breaker: after a few failures in a row a worker gets nothing for a while, then one trial request.
#pragma once

#include <chrono>

namespace kvrouter {

class Breaker {
 public:
  using Clock = std::chrono::steady_clock;
  struct Options {
    unsigned failures = 3;  // in a row
    std::chrono::milliseconds open_for{5000};
  };
  enum class State { kClosed, kOpen, kHalfOpen };

  explicit Breaker(Options options) : options_(options) {}

  State state() const { return state_; }
  bool may_send(Clock::time_point now) const {
    if (state_ == State::kClosed) return true;
    return state_ == State::kOpen && now >= open_until_;
  }
  // REQUIRES: may_send().
  void on_sent() {
    if (state_ == State::kOpen) state_ = State::kHalfOpen;
  }
  void on_success() {
    state_ = State::kClosed;
    failures_ = 0;
  }
  void on_failure(Clock::time_point now) {
    if (state_ != State::kHalfOpen && ++failures_ < options_.failures) return;
    state_ = State::kOpen;
    open_until_ = now + options_.open_for;
  }
  // The request ended without saying anything of the worker (its client went away): the trial is open again.
  void on_abandoned() {
    if (state_ == State::kHalfOpen) state_ = State::kOpen;
  }

 private:
  Options options_;
  State state_ = State::kClosed;
  unsigned failures_ = 0;
  Clock::time_point open_until_{};
};

}  // namespace kvrouter
