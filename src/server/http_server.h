// A small HTTP/1.1 server for request/reply and streamed answers.
//
// One thread runs all sockets.  The handler is called on that thread and must not block; it may answer at once or
// keep the reply and answer later from any thread.  Everything that a client sends is bounded by HttpLimits; what is
// over a limit or malformed is answered with a 4xx and the connection is closed.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "net/http_headers.h"

namespace boost::asio {
class io_context;
}

namespace kvrouter {

struct HttpLimits {
  std::size_t max_header_bytes = 16 * 1024;
  std::size_t max_body_bytes = 16 * 1024 * 1024;
  std::size_t max_connections = 4096;
  std::size_t max_unsent_bytes = 16 * 1024 * 1024;  // of a streamed answer; a client that reads slower is cut off
  std::chrono::seconds idle_timeout{60};     // between requests of a kept-alive connection; of a client not reading
  std::chrono::seconds request_timeout{30};  // from a request's first byte to its last
};

// PEM files of a server that speaks TLS, and nothing else; both empty: it speaks none.
struct TlsFiles {
  std::string certificate;  // leaf first
  std::string key;
};

struct HttpRequest {
  std::string method;  // "GET", "POST", ...
  std::string path;    // without the query
  std::string query;   // without the '?'
  std::string body;
  HttpHeaders headers{};
};

// The answer to one request.  Safe to use from any thread, and after the server has stopped or the client has gone
// (what is written then is dropped).  Either send() once, or begin_stream(), write()..., end().  Dropping the last
// reference without an answer sends a 500.
class HttpReply {
 public:
  virtual ~HttpReply() = default;
  // A header of the answer, to be given before it begins.  REQUIRES: neither holds a line break.
  virtual void add_header(std::string_view name, std::string_view value) = 0;
  virtual void send(unsigned status, std::string_view content_type, std::string body) = 0;
  // A chunked answer: each write() leaves as a chunk of its own at once.
  virtual void begin_stream(unsigned status, std::string_view content_type) = 0;
  virtual void write(std::string chunk) = 0;
  virtual void end() = 0;
  // True once the client has closed its connection.
  virtual bool client_gone() const = 0;
  // Calls `callback` once, on the server's thread, when the client closes its connection before it has its answer.
  virtual void on_client_gone(std::function<void()> callback) = 0;
};

using HttpHandler = std::function<void(HttpRequest&&, std::shared_ptr<HttpReply>)>;

// A handler with network traffic of its own on the server's thread.
struct HttpService {
  HttpHandler handler;
  std::function<void()> on_stop;  // called on that thread: cancels what the handler has under way there
};
using MakeHttpService = std::function<HttpService(boost::asio::io_context&)>;

class HttpServer {
 public:
  // Binds and starts to serve.  port 0: any free port.  Throws std::system_error when the address cannot be bound,
  // std::invalid_argument for TLS files that cannot be used.
  HttpServer(const std::string& host, std::uint16_t port, HttpHandler handler, HttpLimits limits = {});
  HttpServer(const std::string& host, std::uint16_t port, const MakeHttpService& make, HttpLimits limits = {},
             const TlsFiles& tls = {});
  ~HttpServer();  // stop()
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  std::uint16_t port() const;
  // Closes every connection and joins the thread.  Safe to call twice.
  void stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
