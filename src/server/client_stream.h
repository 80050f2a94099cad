// A client's connection as the HTTP server reads and writes it: TCP, or TLS over it.
#pragma once

#include <boost/asio/basic_stream_socket.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <memory>
#include <utility>
#include <variant>

namespace kvrouter::http_detail {

using Executor = boost::asio::io_context::executor_type;
using Socket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, Executor>;
using TlsSocket = boost::asio::ssl::stream<Socket>;

// The part of a socket's interface that a connection needs.
class ClientStream {
 public:
  explicit ClientStream(Socket socket) : stream_(std::move(socket)) {}
  // REQUIRES: the handshake is done.
  explicit ClientStream(std::shared_ptr<TlsSocket> tls) : stream_(std::move(tls)) {}

  auto get_executor() { return socket().get_executor(); }
  template <typename Option>
  void set_option(const Option& option, boost::system::error_code& error) {
    socket().set_option(option, error);
  }
  template <typename Buffers, typename Handler>
  void async_read_some(const Buffers& buffers, Handler&& handler) {
    if (TlsSocket* tls = this->tls()) return tls->async_read_some(buffers, std::forward<Handler>(handler));
    socket().async_read_some(buffers, std::forward<Handler>(handler));
  }
  template <typename Buffers, typename Handler>
  void async_write_some(const Buffers& buffers, Handler&& handler) {
    if (TlsSocket* tls = this->tls()) return tls->async_write_some(buffers, std::forward<Handler>(handler));
    socket().async_write_some(buffers, std::forward<Handler>(handler));
  }
  // Says that nothing more is sent.
  void shutdown(Socket::shutdown_type what, boost::system::error_code& error) {
    const auto* tls = std::get_if<std::shared_ptr<TlsSocket>>(&stream_);
    if (!tls) return void(socket().shutdown(what, error));
    // Ends when the client says the same, or with the socket.
    (*tls)->async_shutdown([keep = *tls](boost::system::error_code) {});
  }
  void close(boost::system::error_code& error) { socket().close(error); }

 private:
  TlsSocket* tls() {
    const auto* tls = std::get_if<std::shared_ptr<TlsSocket>>(&stream_);
    return tls ? tls->get() : nullptr;
  }
  Socket& socket() {
    TlsSocket* over = tls();
    return over ? over->next_layer() : std::get<Socket>(stream_);
  }

  std::variant<Socket, std::shared_ptr<TlsSocket>> stream_;
};

}  // namespace kvrouter::http_detail
