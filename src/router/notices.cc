#include "router/notices.h"

namespace kvrouter {

void Notices::post(Notice::Level level, std::string text) {
  {
    const std::lock_guard lock(mutex_);
    if (queue_.size() >= kCapacity) {
      ++dropped_;
      return;
    }
    queue_.push_back({level, std::move(text)});
  }
  arrived_.notify_one();
}

std::optional<Notice> Notices::next(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  arrived_.wait_for(lock, timeout, [this] { return closed_ || !queue_.empty(); });
  if (queue_.empty()) return std::nullopt;
  Notice notice = std::move(queue_.front());
  queue_.pop_front();
  return notice;
}

void Notices::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  arrived_.notify_all();
}

void Notices::reopen() {
  const std::lock_guard lock(mutex_);
  closed_ = false;
}

std::uint64_t Notices::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

}  // namespace kvrouter
