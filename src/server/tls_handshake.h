// What comes before the first request of a TLS connection.
#pragma once

#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>

#include "net/tls.h"
#include "server/client_stream.h"

namespace kvrouter::http_detail {

class TlsHandshake : public std::enable_shared_from_this<TlsHandshake> {
 public:
  // Called once: with the connection, or with nothing when the client did not get through it in time.
  using Done = std::function<void(std::optional<ClientStream>)>;

  TlsHandshake(Socket socket, TlsContext& context)
      : tls_(std::make_shared<TlsSocket>(std::move(socket), context)), timer_(tls_->get_executor()) {}

  void start(std::chrono::seconds limit, Done done);
  // The server stops: `done` is not called.
  void abort();

 private:
  void on_ended(boost::system::error_code error);

  std::shared_ptr<TlsSocket> tls_;
  boost::asio::basic_waitable_timer<std::chrono::steady_clock, boost::asio::wait_traits<std::chrono::steady_clock>,
                                    Executor>
      timer_;
  Done done_;
};

}  // namespace kvrouter::http_detail
