#include "load/worker_url.h"

#include <stdexcept>
#include <string_view>

namespace kvrouter {

HostPort parse_worker_url(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  const std::string what = "worker_urls: '" + url + "' is not of the form http://host:port";
  if (!std::string_view(url).starts_with(kScheme)) throw std::invalid_argument(what);
  std::string rest = url.substr(kScheme.size());
  if (!rest.empty() && rest.back() == '/') rest.pop_back();
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == rest.size() ||
      rest.find_first_not_of("0123456789", colon + 1) != std::string::npos || rest.find('/') != std::string::npos) {
    throw std::invalid_argument(what);
  }
  std::string host = rest.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {host, rest.substr(colon + 1)};
}

// Asks one worker again and again: wait -> resolve -> connect -> write -> read -> wait.

void validate_worker_url(const std::string& url) {
  if (!url.empty()) parse_worker_url(url);
}

}  // namespace kvrouter
