#include "net/worker_url.h"

#include <stdexcept>

namespace kvrouter {

HostPort parse_worker_url(const std::string& url) {
  const std::string what = "worker_urls: '" + url + "' is not of the form http://host:port or https://host:port";
  const bool tls = url.starts_with("https://");
  if (!tls && !url.starts_with("http://")) throw std::invalid_argument(what);
  std::string rest = url.substr(url.find("//") + 2);
  if (!rest.empty() && rest.back() == '/') rest.pop_back();
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == rest.size() ||
      rest.find_first_not_of("0123456789", colon + 1) != std::string::npos || rest.size() - colon > 6 ||
      std::stoul(rest.substr(colon + 1)) > 65535 || rest.find('/') != std::string::npos) {
    throw std::invalid_argument(what);
  }
  std::string host = rest.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {host, rest.substr(colon + 1), tls};
}

void validate_worker_url(const std::string& url) {
  if (!url.empty()) parse_worker_url(url);
}

}  // namespace kvrouter
