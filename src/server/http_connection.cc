// Invariants:
//  - At most one read, one write and one timer wait are outstanding; each holds the connection alive.
//  - A read is outstanding whenever the connection is open and the client may still send, also while a request is
//    being answered: that is how a client that went away is noticed.  Read-ahead stops at kReadAhead bytes.
//  - Requests of one connection are answered one at a time, so out_ is always in order.
//  - deadline_ follows from the state (refresh_deadline); the timer is set anew only when the deadline gets earlier.
#include "server/http_connection.h"

#include <algorithm>
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/field.hpp>
#include <boost/beast/http/rfc7230.hpp>
#include <boost/beast/http/status.hpp>
#include <cstdio>
#include <utility>

#include "server/http_reply.h"

namespace kvrouter::http_detail {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr std::size_t kReadAhead = 64 * 1024;
// Pipelined requests wait while this much is still unsent.
constexpr std::size_t kUnsentBeforePause = 1024 * 1024;
constexpr std::chrono::seconds kDrainTime{2};

// The target without scheme and authority: "http://host/path?q" is the same request as "/path?q".
std::string_view origin_form(std::string_view target) {
  const std::size_t scheme = target.find("://");
  if (target.empty() || target.front() == '/' || scheme == std::string_view::npos) return target;
  const std::size_t path = target.find('/', scheme + 3);
  return path == std::string_view::npos ? std::string_view("/") : target.substr(path);
}

}  // namespace

Connection::Connection(ClientStream socket, ServerState& server)
    : socket_(std::move(socket)), timer_(socket_.get_executor()), server_(server) {}

void Connection::start() {
  error_code ignored;
  socket_.set_option(net::ip::tcp::no_delay(true), ignored);
  idle_since_ = Clock::now();
  new_parser();
  read();
  refresh_deadline();
}

void Connection::close() {
  if (!open_) return;
  open_ = false;
  client_went();
  error_code ignored;
  socket_.close(ignored);
  timer_.cancel();
  server_.connections.erase(shared_from_this());
}

void Connection::client_went() {
  *gone_ = true;
  if (const auto callback = std::exchange(on_gone_, nullptr)) callback();
}

void Connection::on_gone(std::uint64_t request, std::function<void()> callback) {
  if (request != request_ || !in_flight_) return;
  if (*gone_) return callback();
  on_gone_ = std::move(callback);
}

void Connection::new_parser() {
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(static_cast<std::uint32_t>(server_.limits.max_header_bytes));
  parser_->body_limit(server_.limits.max_body_bytes);
}

void Connection::read() {
  if (!open_ || reading_ || eof_) return;
  const bool blocked = in_flight_ || out_bytes_ >= kUnsentBeforePause;
  if (blocked && in_.size() >= kReadAhead) return;
  reading_ = true;
  socket_.async_read_some(net::buffer(chunk_), [self = shared_from_this()](error_code error, std::size_t count) {
    self->on_read(error, count);
  });
}

void Connection::on_read(error_code error, std::size_t count) {
  reading_ = false;
  if (!open_) return;
  if (error == net::error::eof) {
    // Perhaps only its sending half: what is asked for is still answered, if it can be.
    eof_ = true;
    client_went();
    if (!open_) return;
    if (draining_) return close();
    if (!in_flight_) process();
    return;
  }
  if (error) return close();
  if (draining_ || last_answer_) return read();
  in_.commit(net::buffer_copy(in_.prepare(count), net::buffer(chunk_, count)));
  process();
  read();
}

void Connection::process() {
  if (processing_) return;
  processing_ = true;
  while (open_ && !in_flight_ && !last_answer_ && out_bytes_ < kUnsentBeforePause && parse()) dispatch();
  processing_ = false;
  if (!open_) return;
  if (eof_ && !in_flight_ && !last_answer_ && out_bytes_ < kUnsentBeforePause) {
    // Nothing more will come: half a request is a bad one, none at all is the end.
    if (request_started_) return refuse(400, "the request ended early");
    last_answer_ = true;
    if (out_.empty()) return close();
  }
  refresh_deadline();
}

bool Connection::parse() {
  if (in_.size() == 0) return false;
  if (!request_started_) {
    request_started_ = true;
    request_start_ = Clock::now();
  }
  error_code error;
  while (in_.size() > 0 && !parser_->is_done()) {
    const std::size_t used = parser_->put(in_.data(), error);
    in_.consume(used);
    if (error || used == 0) break;
  }
  if (!error && parser_->is_done()) return true;
  if (!error || error == http::error::need_more) {
    // What the parser leaves in the buffer is a header, or the frame of a chunk, that has no end yet.
    if (in_.size() >= server_.limits.max_header_bytes) {
      refuse(431, "the headers are longer than the server accepts");
    } else {
      continue_if_expected();
    }
    return false;
  }
  if (error == http::error::header_limit) {
    refuse(431, "the headers are longer than the server accepts");
  } else if (error == http::error::body_limit) {
    refuse(413, "the body is longer than the server accepts");
  } else {
    refuse(400, "malformed HTTP: " + error.message());
  }
  return false;
}

void Connection::continue_if_expected() {
  if (continue_sent_ || !parser_->is_header_done() || parser_->get().version() < 11) return;
  const auto expect = parser_->get().find(http::field::expect);
  if (expect == parser_->get().end() || !boost::beast::iequals(expect->value(), "100-continue")) return;
  continue_sent_ = true;
  push("HTTP/1.1 100 Continue\r\n\r\n");
  flush();
}

void Connection::dispatch() {
  // "chunked" is the one coding that is understood; a peer that reads another into it would see other requests.
  const auto codings = parser_->get().count(http::field::transfer_encoding);
  if (codings > 1 ||
      (codings == 1 && !boost::beast::iequals(parser_->get()[http::field::transfer_encoding], "chunked"))) {
    return refuse(400, "the only transfer encoding that is accepted is chunked");
  }
  auto message = parser_->release();
  new_parser();
  request_started_ = continue_sent_ = false;
  in_flight_ = true;
  ++request_;
  keep_alive_ = message.keep_alive();
  is_head_ = message.method() == http::verb::head;
  chunked_ = message.version() >= 11;

  HttpRequest request;
  request.method = std::string(message.method_string());
  const auto raw_target = message.target();
  const std::string_view target = origin_form({raw_target.data(), raw_target.size()});
  const std::size_t question = target.find('?');
  request.path = std::string(target.substr(0, question));
  if (question != std::string_view::npos) request.query = std::string(target.substr(question + 1));
  request.body = std::move(message.body());
  for (const auto& field : message) {
    request.headers.add({field.name_string().data(), field.name_string().size()},
                        {field.value().data(), field.value().size()});
  }
  auto reply = std::make_shared<Reply>(server_.core, weak_from_this(), gone_, request_);
  try {
    server_.handler(std::move(request), std::move(reply));
  } catch (...) {
    // The reply was dropped while the stack was unwound: it has become a 500.
  }
}

void Connection::refuse(unsigned status, std::string_view reason) {
  in_flight_ = streaming_ = request_started_ = false;
  on_gone_ = nullptr;
  is_head_ = keep_alive_ = false;
  ++request_;
  std::string body(reason);
  body += '\n';
  push_head(status, "text/plain; charset=utf-8", body.size(), {});
  push(std::move(body));
  last_answer_ = true;
  flush();
  refresh_deadline();
}

void Connection::send(std::uint64_t request, unsigned status, std::string_view content_type, std::string body,
                      std::string_view headers) {
  if (!open_ || request != request_ || !in_flight_ || streaming_) return;
  push_head(status, content_type, body.size(), headers);
  if (!is_head_ && !body.empty()) push(std::move(body));
  finish();
}

void Connection::begin_stream(std::uint64_t request, unsigned status, std::string_view content_type,
                              std::string_view headers) {
  if (!open_ || request != request_ || !in_flight_ || streaming_) return;
  streaming_ = true;
  if (!chunked_) keep_alive_ = false;  // the end of the connection is the end of the answer
  push_head(status, content_type, std::nullopt, headers);
  flush();
  refresh_deadline();
}

void Connection::write(std::uint64_t request, std::string chunk) {
  if (!open_ || request != request_ || !streaming_ || is_head_) return;
  if (out_bytes_ + chunk.size() > server_.limits.max_unsent_bytes) return close();
  if (chunked_) {
    char size[24];
    const int length = std::snprintf(size, sizeof(size), "%zx\r\n", chunk.size());
    chunk.insert(0, size, static_cast<std::size_t>(length));
    chunk += "\r\n";
  }
  push(std::move(chunk));
  flush();
  refresh_deadline();
}

void Connection::end(std::uint64_t request) {
  if (!open_ || request != request_ || !in_flight_) return;
  if (!streaming_) return send(request, 500, "text/plain", "the handler ended without an answer\n", {});
  if (chunked_ && !is_head_) push("0\r\n\r\n");
  finish();
}

void Connection::abandon(std::uint64_t request) {
  if (!open_ || request != request_ || !in_flight_) return;
  if (streaming_) return close();  // the missing last chunk tells the client that the answer is not whole
  send(request, 500, "text/plain", "the request was dropped by its handler\n", {});
}

void Connection::finish() {
  in_flight_ = streaming_ = false;
  on_gone_ = nullptr;
  idle_since_ = Clock::now();
  if (!keep_alive_) last_answer_ = true;
  flush();
  process();
  read();
}

void Connection::push_head(unsigned status, std::string_view content_type, std::optional<std::size_t> length,
                           std::string_view headers) {
  const auto reason = http::obsolete_reason(http::int_to_status(status));
  std::string head;
  head.reserve(192);
  head += chunked_ ? "HTTP/1.1 " : "HTTP/1.0 ";
  head += std::to_string(status);
  head += ' ';
  head.append(reason.data(), reason.size());
  head += "\r\nContent-Type: ";
  head += content_type;
  if (length) {
    head += "\r\nContent-Length: ";
    head += std::to_string(*length);
  } else {
    head += "\r\nCache-Control: no-cache";
    if (chunked_) head += "\r\nTransfer-Encoding: chunked";
  }
  head += headers;
  if (!keep_alive_) {
    head += "\r\nConnection: close";
  } else if (!chunked_) {
    head += "\r\nConnection: keep-alive";  // HTTP/1.0 closes unless told otherwise
  }
  head += "\r\n\r\n";
  push(std::move(head));
}

void Connection::push(std::string data) {
  if (out_.empty()) last_progress_ = Clock::now();
  out_bytes_ += data.size();
  out_.push_back(std::move(data));
}

void Connection::flush() {
  if (!open_ || writing_) return;
  if (out_.empty()) {
    if (last_answer_) begin_drain();
    return;
  }
  writing_ = true;
  std::array<net::const_buffer, 8> buffers;
  std::size_t offset = out_offset_;
  for (std::size_t i = 0; i < buffers.size() && i < out_.size(); ++i) {
    buffers[i] = net::const_buffer(out_[i].data() + offset, out_[i].size() - offset);
    offset = 0;
  }
  socket_.async_write_some(
      buffers, [self = shared_from_this()](error_code error, std::size_t count) { self->on_written(error, count); });
}

void Connection::on_written(error_code error, std::size_t count) {
  writing_ = false;
  if (!open_) return;
  if (error) return close();
  last_progress_ = Clock::now();
  out_bytes_ -= count;
  out_offset_ += count;
  while (!out_.empty() && out_offset_ >= out_.front().size()) {
    out_offset_ -= out_.front().size();
    out_.pop_front();
  }
  flush();
  if (!open_ || draining_) return;
  process();
  if (open_) read();
}

void Connection::begin_drain() {
  if (eof_) return close();
  // Closing with the client's bytes unread would reset the connection and could take the answer with it.
  draining_ = true;
  error_code ignored;
  socket_.shutdown(net::ip::tcp::socket::shutdown_send, ignored);
  last_progress_ = Clock::now();
  in_.clear();
  read();
  refresh_deadline();
}

void Connection::refresh_deadline() {
  if (!open_) return;
  if (draining_) {
    deadline_ = last_progress_ + kDrainTime;
  } else if (!out_.empty()) {
    deadline_ = last_progress_ + server_.limits.idle_timeout;
  } else if (in_flight_) {
    deadline_ = Clock::time_point::max();
  } else if (request_started_) {
    deadline_ = request_start_ + server_.limits.request_timeout;
  } else {
    deadline_ = idle_since_ + server_.limits.idle_timeout;
  }
  if (deadline_ >= armed_) return;
  armed_ = deadline_;
  timer_.expires_at(deadline_);
  timer_.async_wait([self = shared_from_this()](error_code error) {
    if (!error) self->on_timer();
  });
}

void Connection::on_timer() {
  if (!open_) return;
  armed_ = Clock::time_point::max();
  if (Clock::now() < deadline_) return refresh_deadline();
  if (!draining_ && out_.empty() && request_started_) return refuse(408, "the request took too long to arrive");
  close();
}

}  // namespace kvrouter::http_detail
