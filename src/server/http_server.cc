#include "server/http_server.h"

#include <sys/socket.h>

#include <boost/asio/basic_socket_acceptor.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "net/tls.h"
#include "server/api_error.h"
#include "server/http_connection.h"
#include "server/tls_handshake.h"

namespace kvrouter {
namespace {

namespace net = boost::asio;
using boost::system::error_code;
using http_detail::ClientStream;
using http_detail::Connection;
using http_detail::Core;
using http_detail::Executor;
using http_detail::ServerState;
using http_detail::Socket;
using http_detail::Timer;
using http_detail::TlsHandshake;
using Acceptor = net::basic_socket_acceptor<net::ip::tcp, Executor>;

constexpr std::chrono::milliseconds kAcceptRetry{50};

std::vector<net::ip::tcp::endpoint> addresses_of(net::io_context& context, std::string host, std::uint16_t port,
                                                 const std::string& where) {
  if (host.empty() || host == "*") host = "0.0.0.0";
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  error_code error;
  const auto literal = net::ip::make_address(host, error);
  if (!error) return {{literal, port}};
  net::ip::tcp::resolver resolver(context);
  const auto found = resolver.resolve(host, std::to_string(port), net::ip::tcp::resolver::passive, error);
  if (error) {
    throw std::system_error(EADDRNOTAVAIL, std::generic_category(), where + ": " + error.message());
  }
  // IPv4 first: a name like "localhost" has both, and clients that are given a port try 127.0.0.1.
  std::vector<net::ip::tcp::endpoint> endpoints;
  for (const bool v4 : {true, false}) {
    for (const auto& entry : found) {
      if (entry.endpoint().address().is_v4() == v4) endpoints.push_back(entry.endpoint());
    }
  }
  return endpoints;
}

Acceptor listen_on(net::io_context& context, const std::string& host, std::uint16_t port) {
  const std::string where = "cannot listen on " + host + ":" + std::to_string(port);
  error_code error = net::error::host_not_found;
  for (const auto& endpoint : addresses_of(context, host, port, where)) {
    Acceptor acceptor(context);
    error = {};
    acceptor.open(endpoint.protocol(), error);
    if (!error) acceptor.set_option(net::socket_base::reuse_address(true), error);
    if (!error) acceptor.bind(endpoint, error);
    if (!error) acceptor.listen(net::socket_base::max_listen_connections, error);
    if (!error) return acceptor;
  }
  throw std::system_error(error.value(), std::system_category(), where);
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const std::string& host, std::uint16_t port, const MakeHttpService& make, HttpLimits limits, const TlsFiles& tls)
      : server_{nullptr, limits, std::make_shared<Core>(), {}},
        tls_(tls.certificate.empty() && tls.key.empty() ? nullptr : server_tls(tls.certificate, tls.key)),
        work_(server_.core->context.get_executor()),
        acceptor_(listen_on(server_.core->context, host, port)),
        retry_(server_.core->context),
        port_(acceptor_.local_endpoint().port()) {
    HttpService service = make(server_.core->context);
    server_.handler = std::move(service.handler);
    on_stop_ = std::move(service.on_stop);
    accept();
    thread_ = std::thread([this] { server_.core->context.run(); });
  }

  ~Impl() { stop(); }

  std::uint16_t port() const { return port_; }

  void stop() {
    std::lock_guard lock(stop_mutex_);
    if (!thread_.joinable()) return;
    net::post(server_.core->context, [this] {
      server_.core->stopped = true;
      error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      if (on_stop_) on_stop_();
      for (const auto& handshake : std::exchange(handshakes_, {})) handshake->abort();
      const auto connections = server_.connections;
      for (const auto& connection : connections) connection->close();
      work_.reset();
    });
    thread_.join();
  }

 private:
  void accept() {
    acceptor_.async_accept([this](error_code error, net::basic_stream_socket<net::ip::tcp, Executor> socket) {
      if (!acceptor_.is_open()) return;
      if (error) {
        // Out of file descriptors, mostly: trying again at once would only spin.
        retry_.expires_after(kAcceptRetry);
        retry_.async_wait([this](error_code cancelled) {
          if (!cancelled && acceptor_.is_open()) accept();
        });
        return;
      }
      if (server_.connections.size() + handshakes_.size() >= server_.limits.max_connections) {
        turn_away(socket);
      } else if (tls_) {
        shake_hands(std::move(socket));
      } else {
        serve(ClientStream(std::move(socket)));
      }
      accept();
    });
  }

  void serve(ClientStream stream) {
    auto connection = std::make_shared<Connection>(std::move(stream), server_);
    server_.connections.insert(connection);
    connection->start();
  }

  void shake_hands(Socket socket) {
    auto handshake = std::make_shared<TlsHandshake>(std::move(socket), *tls_);
    handshakes_.insert(handshake);
    handshake->start(server_.limits.request_timeout, [this, raw = handshake.get()](std::optional<ClientStream> stream) {
      handshakes_.erase(raw->shared_from_this());
      if (stream) serve(std::move(*stream));
    });
  }

  void turn_away(Socket& socket) {
    if (!tls_) {
      const std::string body =
          api_error_json(503, "the server has its " + std::to_string(server_.limits.max_connections) +
                                  " connections: keep fewer open");
      const std::string answer =
          "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
          "Content-Type: application/json\r\nContent-Length: " +
          std::to_string(body.size()) + "\r\n\r\n" + body;
      ::send(socket.native_handle(), answer.data(), answer.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    error_code ignored;
    socket.shutdown(net::ip::tcp::socket::shutdown_send, ignored);
    socket.close(ignored);
  }

  ServerState server_;
  std::shared_ptr<TlsContext> tls_;  // null: it speaks none
  std::unordered_set<std::shared_ptr<TlsHandshake>> handshakes_;
  std::function<void()> on_stop_;
  net::executor_work_guard<Executor> work_;
  Acceptor acceptor_;
  Timer retry_;
  std::uint16_t port_;
  std::mutex stop_mutex_;
  std::thread thread_;
};

HttpServer::HttpServer(const std::string& host, std::uint16_t port, HttpHandler handler, HttpLimits limits)
    : HttpServer(
          host, port, [&handler](net::io_context&) { return HttpService{std::move(handler), nullptr}; }, limits) {}
HttpServer::HttpServer(const std::string& host, std::uint16_t port, const MakeHttpService& make, HttpLimits limits,
                       const TlsFiles& tls)
    : impl_(std::make_unique<Impl>(host, port, make, limits, tls)) {}
HttpServer::~HttpServer() = default;
std::uint16_t HttpServer::port() const {
  return impl_->port();
}
void HttpServer::stop() {
  impl_->stop();
}

}  // namespace kvrouter
