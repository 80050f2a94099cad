// Bytes of a client's connection to the HTTP server, from the socket to the handler and back.
//
// Input: a byte for how the handler answers, a byte for the length of the pieces in which the rest arrives.
#include "server/http_connection.h"

#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/ip/tcp.hpp>
#include <memory>
#include <string>

#include "fuzz.h"

namespace kvrouter::fuzz {
namespace {

using http_detail::Connection;
using http_detail::Core;
using http_detail::ServerState;
using http_detail::Socket;

void answer(unsigned mode, HttpRequest&& request, std::shared_ptr<HttpReply> reply, std::string_view input) {
  FUZZ_CHECK(request.path.find('?') == std::string::npos);
  FUZZ_CHECK(request.body.size() <= input.size());
  FUZZ_CHECK(request.method.size() + request.path.size() + request.query.size() <= input.size());
  reply->on_client_gone([] {});
  switch (mode % 4) {
    case 0:
      return reply->send(200, "text/plain", request.body);
    case 1:
      reply->begin_stream(200, "text/event-stream");
      reply->write(request.method);
      reply->write(std::move(request.body));
      return reply->end();
    case 2:
      reply->begin_stream(200, "text/event-stream");
      return;  // dropped in the middle
    default:
      throw std::runtime_error("a handler that fails");
  }
}

// Status lines only stand where an answer begins.
void check_first_answer(std::string_view answered) {
  if (answered.empty()) return;
  FUZZ_CHECK(answered.starts_with("HTTP/1.1 ") || answered.starts_with("HTTP/1.0 "));
  FUZZ_CHECK(answered.size() > 12 && answered[9] >= '1' && answered[9] <= '5');
  FUZZ_CHECK(answered.find("\r\n\r\n") != std::string_view::npos);
}

}  // namespace

void fuzz_one(std::string_view input) {
  Reader in(input);
  const unsigned mode = in.byte();
  const std::size_t piece = std::size_t{1} + in.byte() * std::size_t{16};

  const auto core = std::make_shared<Core>();
  ServerState server;
  server.core = core;
  server.limits.max_header_bytes = 1024;
  server.limits.max_body_bytes = 4096;
  server.handler = [&](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    answer(mode, std::move(request), std::move(reply), input);
  };
  int ends[2];
  FUZZ_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
  // A Unix socket in a TCP socket's clothes: reads and writes are the same.
  Socket socket(core->context.get_executor(), boost::asio::ip::tcp::v4(), ends[0]);
  const auto connection = std::make_shared<Connection>(http_detail::ClientStream(std::move(socket)), server);
  server.connections.insert(connection);
  connection->start();

  std::string answered;
  char buffer[16 * 1024];
  const auto turn = [&] {
    core->context.restart();
    core->context.poll();
    for (ssize_t count = 0; (count = ::recv(ends[1], buffer, sizeof(buffer), 0)) > 0;) {
      answered.append(buffer, static_cast<std::size_t>(count));
    }
  };
  while (!in.empty()) {
    const std::string_view next = in.bytes(piece);
    if (::send(ends[1], next.data(), next.size(), MSG_NOSIGNAL) < 0) break;
    turn();
  }
  ::shutdown(ends[1], SHUT_WR);
  for (int i = 0; i < 3; ++i) turn();
  check_first_answer(answered);
  connection->close();
  ::close(ends[1]);
  turn();
  FUZZ_CHECK(server.connections.empty());
}

}  // namespace kvrouter::fuzz
