#include "net/upstream.h"

#include <array>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <deque>
#include <limits>

namespace kvrouter {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

// Beast reads as much as the buffer has room for, and 512 bytes at first: that would cut events in two which the worker
// sent whole, and there are clients that do not put them together again.
constexpr std::size_t kReadSize = 16 * 1024;

struct Link {
  explicit Link(net::io_context& io) : stream(io) { buffer.reserve(kReadSize); }
  beast::tcp_stream stream;
  std::optional<net::ssl::stream<beast::tcp_stream&>> tls;  // over `stream`, which keeps the deadlines
  beast::flat_buffer buffer;
  Clock::time_point idle_since;
};

}  // namespace

class UpstreamPool::Shared {
 public:
  Shared(net::io_context& context, HostPort at, UpstreamLimits upstream_limits, std::shared_ptr<TlsContext> tls_context)
      : io(context), address(std::move(at)), limits(upstream_limits), tls(std::move(tls_context)) {}

  std::unique_ptr<Link> take() {
    const auto oldest = Clock::now() - limits.keep_idle;
    while (!idle.empty() && idle.front()->idle_since < oldest) idle.pop_front();
    if (idle.empty()) return nullptr;
    auto link = std::move(idle.back());  // the one used last is the likeliest to be open
    idle.pop_back();
    return link;
  }
  void keep(std::unique_ptr<Link> link) {
    if (closed || idle.size() >= limits.max_idle || link->buffer.size() > 0) return;
    link->stream.expires_never();
    link->idle_since = Clock::now();
    idle.push_back(std::move(link));
  }

  net::io_context& io;
  HostPort address;
  UpstreamLimits limits;
  std::shared_ptr<TlsContext> tls;
  std::deque<std::unique_ptr<Link>> idle;
  bool closed = false;
};

namespace {

// Each step holds the call alive; after finish() or cancel() the steps under way do nothing.
class Call final : public UpstreamCall, public std::enable_shared_from_this<Call> {
 public:
  Call(std::shared_ptr<UpstreamPool::Shared> pool, std::string request, UpstreamEvents events, UpstreamLimits limits)
      : pool_(std::move(pool)),
        limits_(limits),
        resolver_(pool_->io),
        request_(std::move(request)),
        events_(std::move(events)) {}

  void start() {
    link_ = pool_->take();
    reused_ = link_ != nullptr;
    reused_ ? write() : connect();
  }

  void cancel() override {
    if (!open_) return;
    open_ = false;
    resolver_.cancel();
    if (link_) link_->stream.close();
    // One of them may be who calls: they end when it has returned.
    net::post(pool_->io, [ended = std::move(events_)] {});
    events_ = {};
  }

 private:
  template <typename Step>
  auto step(Step step) {
    return [self = shared_from_this(), step = std::move(step)](error_code error, auto&&... results) {
      if (self->open_) step(error, std::forward<decltype(results)>(results)...);
    };
  }

  void connect() {
    reused_ = false;
    link_ = std::make_unique<Link>(pool_->io);
    error_code not_literal;
    const auto literal = net::ip::make_address(pool_->address.host, not_literal);
    if (!not_literal) {
      const auto port = static_cast<std::uint16_t>(std::stoul(pool_->address.port));
      link_->stream.expires_after(limits_.connect_timeout);
      link_->stream.async_connect(net::ip::tcp::endpoint(literal, port),
                                  step([this](error_code error) { on_connected(error); }));
      return;
    }
    resolver_.async_resolve(pool_->address.host, pool_->address.port,
                            step([this](error_code error, net::ip::tcp::resolver::results_type endpoints) {
                              if (error) return finish("its name cannot be resolved");
                              link_->stream.expires_after(limits_.connect_timeout);
                              link_->stream.async_connect(
                                  endpoints, step([this](error_code failed, auto&&...) { on_connected(failed); }));
                            }));
  }

  void on_connected(error_code error) {
    if (error) return finish("it cannot be connected to: " + error.message());
    error_code ignored;
    link_->stream.socket().set_option(net::ip::tcp::no_delay(true), ignored);
    pool_->address.tls ? shake_hands() : write();
  }

  void shake_hands() {
    auto& tls = link_->tls.emplace(link_->stream, *pool_->tls);
    if (!expect_peer(tls.native_handle(), pool_->address.host)) return finish("no certificate can be for its address");
    tls.async_handshake(net::ssl::stream_base::client, step([this](error_code error) {
                          if (!error) return write();
                          finish("no TLS with it: " + error.message() + why_untrusted(link_->tls->native_handle()));
                        }));
  }

  // Calls `operation` with what is read from and written to.
  template <typename Operation>
  void on_stream(Operation operation) {
    link_->tls ? operation(*link_->tls) : operation(link_->stream);
  }

  void write() {
    link_->stream.expires_after(limits_.head_timeout);
    on_stream([this](auto& stream) {
      net::async_write(stream, net::buffer(request_), step([this](error_code error, std::size_t) {
                         // An answer may be there all the same: a worker that refuses a long body closes early.
                         write_error_ = error;
                         read_head();
                       }));
    });
  }

  void read_head() {
    parser_.emplace();
    parser_->header_limit(static_cast<std::uint32_t>(limits_.max_header_bytes));
    parser_->body_limit(std::numeric_limits<std::uint64_t>::max());  // none would refuse every length
    parser_->get().body().data = chunk_.data();
    parser_->get().body().size = 0;
    on_stream([this](auto& stream) {
      http::async_read_header(stream, link_->buffer, *parser_,
                              step([this](error_code error, std::size_t read) { on_head(error, read); }));
    });
  }

  void on_head(error_code error, std::size_t read) {
    if (error == http::error::need_buffer) error = {};
    if (error) {
      if (reused_ && read == 0 && error != beast::error::timeout) return connect();
      return finish("it closed without an answer: " + (write_error_ ? write_error_ : error).message());
    }
    const auto& message = parser_->get();
    if (message.result_int() < 200 && message.result_int() != 101) return read_head();  // "100 Continue"
    UpstreamHead head;
    head.status = message.result_int();
    for (const auto& field : message) {
      head.headers.add({field.name_string().data(), field.name_string().size()},
                       {field.value().data(), field.value().size()});
    }
    head.content_type = std::string(head.headers.get("content-type"));
    if (const auto length = parser_->content_length(); length && !parser_->chunked()) head.length = *length;
    if (events_.on_head) events_.on_head(head);
    if (open_) read_body();
  }

  void read_body() {
    if (parser_->is_done()) return finish({});
    parser_->eager(true);  // reading the head has turned it off
    parser_->get().body().data = chunk_.data();
    parser_->get().body().size = chunk_.size();
    link_->stream.expires_after(limits_.body_timeout);
    on_stream([this](auto& stream) {
      http::async_read_some(stream, link_->buffer, *parser_,
                            step([this](error_code error, std::size_t) { on_body(error); }));
    });
  }

  void on_body(error_code error) {
    if (error == http::error::need_buffer) error = {};
    const std::size_t count = chunk_.size() - parser_->get().body().size;
    if (count > 0 && events_.on_data) events_.on_data({chunk_.data(), count});
    if (!open_) return;
    if (error) return finish("it broke off its answer: " + error.message());
    read_body();
  }

  void finish(const std::string& error) {
    open_ = false;
    if (error.empty() && parser_->keep_alive()) {
      pool_->keep(std::move(link_));
    } else if (link_) {
      link_->stream.close();
    }
    const auto on_end = std::move(events_.on_end);
    events_ = {};
    if (on_end) on_end(error);
  }

  std::shared_ptr<UpstreamPool::Shared> pool_;
  UpstreamLimits limits_;
  net::ip::tcp::resolver resolver_;
  std::string request_;
  UpstreamEvents events_;
  std::unique_ptr<Link> link_;
  std::optional<http::response_parser<http::buffer_body>> parser_;
  std::array<char, 16 * 1024> chunk_;
  error_code write_error_;
  bool reused_ = false;
  bool open_ = true;
};

// Keeps the answer until it is whole.
UpstreamEvents collect(std::size_t most, std::function<void(unsigned, std::string)> done) {
  struct Collected {
    unsigned status = 0;
    std::string body;
    bool too_long = false;
  };
  auto collected = std::make_shared<Collected>();
  return {[collected](const UpstreamHead& head) { collected->status = head.status; },
          [collected, most](std::string_view data) {
            collected->too_long = collected->too_long || collected->body.size() + data.size() > most;
            if (!collected->too_long) collected->body += data;
          },
          [collected, done = std::move(done)](const std::string& error) {
            if (!error.empty()) return done(0, error);
            if (collected->too_long) return done(0, "its answer is too long");
            done(collected->status, std::move(collected->body));
          }};
}

}  // namespace

UpstreamPool::UpstreamPool(net::io_context& io, HostPort address, UpstreamLimits limits,
                           std::shared_ptr<TlsContext> tls)
    : shared_(std::make_shared<Shared>(io, std::move(address), limits, std::move(tls))) {}

UpstreamPool::~UpstreamPool() {
  shared_->closed = true;
  shared_->idle.clear();
}

std::shared_ptr<UpstreamCall> UpstreamPool::start(std::string request, UpstreamEvents events) {
  auto call = std::make_shared<Call>(shared_, std::move(request), std::move(events), shared_->limits);
  call->start();
  return call;
}

std::shared_ptr<UpstreamCall> UpstreamPool::get(std::string_view path, std::chrono::milliseconds timeout,
                                                std::function<void(unsigned, std::string)> done) {
  UpstreamLimits limits = shared_->limits;
  limits.connect_timeout = limits.head_timeout = limits.body_timeout = timeout;
  std::string request = "GET " + std::string(path) + " HTTP/1.1\r\nHost: " + authority() + "\r\n\r\n";
  auto call =
      std::make_shared<Call>(shared_, std::move(request), collect(limits.max_collected, std::move(done)), limits);
  call->start();
  return call;
}

std::shared_ptr<UpstreamCall> UpstreamPool::post_json(std::string_view path, std::string_view body,
                                                      std::function<void(unsigned, std::string)> done) {
  std::string request = "POST " + std::string(path) + " HTTP/1.1\r\nHost: " + authority() +
                        "\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
                        "\r\n\r\n";
  request += body;
  return start(std::move(request), collect(shared_->limits.max_collected, std::move(done)));
}

std::size_t UpstreamPool::idle() const {
  return shared_->idle.size();
}
const HostPort& UpstreamPool::address() const {
  return shared_->address;
}
std::string UpstreamPool::authority() const {
  const HostPort& at = shared_->address;
  return (at.host.find(':') == std::string::npos ? at.host : "[" + at.host + "]") + ":" + at.port;
}

}  // namespace kvrouter
