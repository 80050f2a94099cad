// What a handler holds of a request: passes the answer on to the connection, on the server's thread.
#pragma once

#include <atomic>
#include <boost/asio/dispatch.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "server/http_connection.h"

namespace kvrouter::http_detail {

class Reply final : public HttpReply {
 public:
  Reply(std::shared_ptr<Core> core, std::weak_ptr<Connection> connection, std::shared_ptr<std::atomic<bool>> gone,
        std::uint64_t request)
      : core_(std::move(core)), connection_(std::move(connection)), gone_(std::move(gone)), request_(request) {}

  ~Reply() override {
    if (!done_) post([request = request_](Connection& c) { c.abandon(request); });
  }

  void add_header(std::string_view name, std::string_view value) override {
    if (done_) return;
    headers_.append("\r\n").append(name).append(": ").append(value);
  }
  void send(unsigned status, std::string_view content_type, std::string body) override {
    if (done_.exchange(true)) return;
    post([request = request_, status, type = std::string(content_type), body = std::move(body),
          headers = std::move(headers_)](Connection& c) mutable {
      c.send(request, status, type, std::move(body), headers);
    });
  }
  void begin_stream(unsigned status, std::string_view content_type) override {
    if (done_) return;
    post([request = request_, status, type = std::string(content_type), headers = std::move(headers_)](Connection& c) {
      c.begin_stream(request, status, type, headers);
    });
  }
  void write(std::string chunk) override {
    if (done_ || chunk.empty() || *gone_) return;
    post([request = request_, chunk = std::move(chunk)](Connection& c) mutable { c.write(request, std::move(chunk)); });
  }
  void end() override {
    if (done_.exchange(true)) return;
    post([request = request_](Connection& c) { c.end(request); });
  }
  bool client_gone() const override { return *gone_; }
  void on_client_gone(std::function<void()> callback) override {
    post([request = request_, callback = std::move(callback)](Connection& c) mutable {
      c.on_gone(request, std::move(callback));
    });
  }

 private:
  // The connection is locked on the server's thread only, so that it never dies on another one.
  template <typename Action>
  void post(Action action) {
    if (core_->stopped) return;
    boost::asio::dispatch(core_->context, [connection = connection_, action = std::move(action)]() mutable {
      if (auto locked = connection.lock()) action(*locked);
    });
  }

  std::shared_ptr<Core> core_;
  std::weak_ptr<Connection> connection_;
  std::shared_ptr<std::atomic<bool>> gone_;
  std::uint64_t request_;
  std::string headers_;  // "\r\nName: value"...
  std::atomic<bool> done_{false};
};

}  // namespace kvrouter::http_detail
