// Invariants:
//  - At most one read, one write and one timer wait are outstanding; each holds the connection alive.
//  - A read is outstanding whenever the connection is open and the client may still send, also while a request is
//    being answered: that is how a client that went away is noticed.  Read-ahead stops at kReadAhead bytes.
//  - Requests of one connection are answered one at a time, so out_ is always in order.
//  - What a request has to be is in http_connection_requests.cc.
//  - deadline_ follows from the state (refresh_deadline); the timer is set anew only when the deadline gets earlier.
#include "server/http_connection.h"

#include <algorithm>
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/beast/http/status.hpp>
#include <cstdio>
#include <utility>

namespace kvrouter::http_detail {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr std::size_t kReadAhead = 64 * 1024;
// Pipelined requests wait while this much is still unsent.
constexpr std::size_t kUnsentBeforePause = 1024 * 1024;
constexpr std::chrono::seconds kDrainTime{2};

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
