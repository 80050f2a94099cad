#include "net/worker_url.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace kvrouter {
namespace {

bool is_port(std::string_view text) {
  unsigned port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  return error == std::errc() && end == text.data() + text.size() && text.size() <= 5 && port >= 1 && port <= 65535;
}

// It stands in the head of requests to the worker.
bool is_host(std::string_view text) {
  return !text.empty() && std::none_of(text.begin(), text.end(), [](char c) {
    return static_cast<unsigned char>(c) <= ' ' || c == '\x7f' || c == '/' || c == '@' || c == '?' || c == '#';
  });
}

}  // namespace

HostPort parse_worker_url(const std::string& url) {
  const std::string what = "worker_urls: '" + url + "' is not of the form http://host:port or https://host:port";
  const bool tls = url.starts_with("https://");
  if (!tls && !url.starts_with("http://")) throw std::invalid_argument(what);
  std::string rest = url.substr(url.find("//") + 2);
  if (!rest.empty() && rest.back() == '/') rest.pop_back();
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string::npos) throw std::invalid_argument(what);
  std::string host = rest.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  if (!is_host(host) || !is_port(std::string_view(rest).substr(colon + 1))) throw std::invalid_argument(what);
  return {host, rest.substr(colon + 1), tls};
}

void validate_worker_url(const std::string& url) {
  if (!url.empty()) parse_worker_url(url);
}

}  // namespace kvrouter
