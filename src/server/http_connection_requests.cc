// How a connection takes requests from what it has read: whole ones go to the handler, what is malformed or over a
// limit is refused, and ends the connection.
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/field.hpp>
#include <boost/beast/http/rfc7230.hpp>
#include <utility>

#include "server/http_connection.h"
#include "server/http_reply.h"

namespace kvrouter::http_detail {
namespace {

namespace http = boost::beast::http;
using boost::system::error_code;

// The target without scheme and authority: "http://host/path?q" is the same request as "/path?q".
std::string_view origin_form(std::string_view target) {
  const std::size_t scheme = target.find("://");
  if (target.empty() || target.front() == '/' || scheme == std::string_view::npos) return target;
  const std::size_t path = target.find('/', scheme + 3);
  return path == std::string_view::npos ? std::string_view("/") : target.substr(path);
}

}  // namespace

void Connection::new_parser() {
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(static_cast<std::uint32_t>(server_.limits.max_header_bytes));
  parser_->body_limit(server_.limits.max_body_bytes);
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

}  // namespace kvrouter::http_detail
