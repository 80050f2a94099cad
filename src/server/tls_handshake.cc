#include "server/tls_handshake.h"

#include <openssl/err.h>
#include <openssl/sslerr.h>
#include <sys/socket.h>

#include <boost/asio/ssl/error.hpp>
#include <string_view>

namespace kvrouter::http_detail {
namespace {

namespace net = boost::asio;
using boost::system::error_code;

// What a browser shows to somebody who wrote http:// for https://.
constexpr std::string_view kPlainHttp =
    "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 36\r\n\r\n"
    "this port speaks TLS: use https://\r\n";

bool spoke_plain_http(const error_code& error) {
  return error.category() == net::error::get_ssl_category() &&
         ERR_GET_REASON(static_cast<unsigned long>(error.value())) == SSL_R_HTTP_REQUEST;
}

}  // namespace

void TlsHandshake::start(std::chrono::seconds limit, Done done) {
  done_ = std::move(done);
  timer_.expires_after(limit);
  timer_.async_wait([self = shared_from_this()](error_code error) {
    error_code ignored;
    if (!error) self->tls_->next_layer().close(ignored);  // which ends the handshake
  });
  tls_->async_handshake(net::ssl::stream_base::server,
                        [self = shared_from_this()](error_code error) { self->on_ended(error); });
}

void TlsHandshake::abort() {
  done_ = nullptr;
  timer_.cancel();
  error_code ignored;
  tls_->next_layer().close(ignored);
}

void TlsHandshake::on_ended(error_code error) {
  timer_.cancel();
  const Done done = std::move(done_);
  if (!done) return;
  if (!error) return done(ClientStream(std::move(tls_)));
  Socket& socket = tls_->next_layer();
  error_code ignored;
  if (spoke_plain_http(error)) {
    ::send(socket.native_handle(), kPlainHttp.data(), kPlainHttp.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    socket.shutdown(Socket::shutdown_send, ignored);
  }
  socket.close(ignored);
  done(std::nullopt);
}

}  // namespace kvrouter::http_detail
