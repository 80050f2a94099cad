// Handlers and helpers for tests of the HTTP server.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/http_server.h"

namespace kvrouter::testing {

inline void echo(HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
  reply->send(200, "text/plain", request.method + " " + request.path + " " + request.query + " " + request.body);
}

inline std::string status_of(const std::string& answer) {
  return answer.substr(0, answer.find("\r\n"));
}

inline std::string body_of(const std::string& answer) {
  const std::size_t at = answer.find("\r\n\r\n");
  return at == std::string::npos ? std::string() : answer.substr(at + 4);
}

// Replies kept by a handler for the test to answer.
class Kept {
 public:
  HttpHandler handler() {
    return [this](HttpRequest&&, std::shared_ptr<HttpReply> reply) {
      std::lock_guard lock(mutex_);
      replies_.push_back(std::move(reply));
    };
  }
  std::shared_ptr<HttpReply> take() {
    for (int i = 0; i < 1000; ++i) {
      {
        std::lock_guard lock(mutex_);
        if (!replies_.empty()) {
          auto reply = std::move(replies_.front());
          replies_.erase(replies_.begin());
          return reply;
        }
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    throw std::runtime_error("no request came");
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<HttpReply>> replies_;
};

inline bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return condition();
}

}  // namespace kvrouter::testing
