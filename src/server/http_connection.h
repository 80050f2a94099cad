// One client connection of the HTTP server: reads requests one after the other, hands each to the server's handler,
// writes the answers in order.  Everything here runs on the server's thread; HttpReply is what other threads hold.
#pragma once

#include <array>
#include <atomic>
#include <boost/asio/basic_waitable_timer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>

#include "server/client_stream.h"
#include "server/http_server.h"

namespace kvrouter::http_detail {

using Clock = std::chrono::steady_clock;
using Timer = boost::asio::basic_waitable_timer<Clock, boost::asio::wait_traits<Clock>, Executor>;

// Outlives the server for as long as somebody keeps a reply.
struct Core {
  boost::asio::io_context context{1};
  std::atomic<bool> stopped{false};
};

class Connection;

// What the connections of one server share.  Lives until the server's thread has ended.
struct ServerState {
  HttpHandler handler;
  HttpLimits limits;
  std::shared_ptr<Core> core;
  std::unordered_set<std::shared_ptr<Connection>> connections;
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(ClientStream socket, ServerState& server);

  void start();
  void close();

  // The answer to request number `request`; ignored when that request is not the one being answered.
  void send(std::uint64_t request, unsigned status, std::string_view content_type, std::string body,
            std::string_view headers);
  void begin_stream(std::uint64_t request, unsigned status, std::string_view content_type, std::string_view headers);
  void write(std::uint64_t request, std::string chunk);
  void end(std::uint64_t request);
  // To be called when the client goes before request number `request` is answered; at once when it has gone.
  void on_gone(std::uint64_t request, std::function<void()> callback);
  // The reply was dropped: 500 when nothing was sent, a cut connection when a stream was left open.
  void abandon(std::uint64_t request);

 private:
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;

  void new_parser();
  void read();
  void on_read(boost::system::error_code error, std::size_t count);
  void process();
  bool parse();  // true when a whole request was taken from the buffer
  void continue_if_expected();
  void dispatch();
  void refuse(unsigned status, std::string_view reason);
  void finish();
  void push(std::string data);
  void push_head(unsigned status, std::string_view content_type, std::optional<std::size_t> length,
                 std::string_view headers);
  void client_went();
  void flush();
  void on_written(boost::system::error_code error, std::size_t count);
  void begin_drain();
  void refresh_deadline();
  void on_timer();

  ClientStream socket_;
  Timer timer_;
  ServerState& server_;
  // Read by replies on other threads.
  std::shared_ptr<std::atomic<bool>> gone_ = std::make_shared<std::atomic<bool>>(false);

  std::array<char, 16 * 1024> chunk_;  // where reads go: in_ may be parsed while one is outstanding
  boost::beast::flat_buffer in_;
  std::optional<Parser> parser_;
  bool reading_ = false;
  bool eof_ = false;
  bool request_started_ = false;  // some of a request is here, not all
  bool continue_sent_ = false;
  Clock::time_point request_start_;
  Clock::time_point idle_since_;

  std::function<void()> on_gone_;
  std::uint64_t request_ = 0;  // number of the request being answered
  bool in_flight_ = false;     // the handler has it
  bool processing_ = false;
  bool streaming_ = false;
  bool keep_alive_ = true;
  bool is_head_ = false;
  bool chunked_ = true;

  std::deque<std::string> out_;
  std::size_t out_offset_ = 0;  // bytes of out_.front() already sent
  std::size_t out_bytes_ = 0;
  bool writing_ = false;
  bool last_answer_ = false;  // close once out_ is sent
  bool draining_ = false;     // all sent; the client's leftovers are thrown away until it closes
  Clock::time_point last_progress_;

  Clock::time_point deadline_ = Clock::time_point::max();
  Clock::time_point armed_ = Clock::time_point::max();
  bool open_ = true;
};

}  // namespace kvrouter::http_detail
