// The address of a worker's HTTP server.
#pragma once

#include <string>

namespace kvrouter {

struct HostPort {
  std::string host;  // a name or an IP address, without brackets
  std::string port;
  bool tls = false;
};

// Of "http://host:port" or "https://host:port", the port from 1 to 65535.  Throws std::invalid_argument for anything
// else.
HostPort parse_worker_url(const std::string& url);
// The same check alone; the empty URL passes.
void validate_worker_url(const std::string& url);

}  // namespace kvrouter
