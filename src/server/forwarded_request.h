// A client's request as it goes to a worker.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "server/http_server.h"

namespace kvrouter {

struct ForwardTo {
  std::string_view authority{};    // host:port, for the Host header
  std::optional<unsigned> rank{};  // which of the server's engines, if they are told apart
  bool with_authorization = true;  // false: it was for the gateway
};

// The whole HTTP/1.1 message.  Headers stay in their order, without those of the connection itself (RFC 9110, 7.6.1);
// the length of the body is told anew, whatever way it came in.
std::string forwarded_request(const HttpRequest& request, const ForwardTo& to);

}  // namespace kvrouter
