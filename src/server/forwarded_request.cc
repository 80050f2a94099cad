#include "server/forwarded_request.h"

#include <algorithm>

namespace kvrouter {
namespace {

// vLLM's: which of a server's engines is to have the request.
constexpr std::string_view kRankHeader = "X-data-parallel-rank";

// Headers of the connection, not of the request, and those that are set anew.
bool stays_here(std::string_view name) {
  for (const std::string_view other :
       {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
        "upgrade", "proxy-connection", "host", "content-length", "expect"}) {
    if (equal_ignoring_case(name, other)) return true;
  }
  return false;
}

// Whether the Connection header names this one.
bool is_named_in(std::string_view list, std::string_view name) {
  while (!list.empty()) {
    const std::size_t comma = std::min(list.find(','), list.size());
    std::string_view item = list.substr(0, comma);
    list.remove_prefix(std::min(comma + 1, list.size()));
    while (item.starts_with(' ') || item.starts_with('\t')) item.remove_prefix(1);
    while (item.ends_with(' ') || item.ends_with('\t')) item.remove_suffix(1);
    if (equal_ignoring_case(item, name)) return true;
  }
  return false;
}

}  // namespace

std::string forwarded_request(const HttpRequest& request, const ForwardTo& to) {
  std::string text;
  text.reserve(request.body.size() + 512);
  text.append(request.method).append(" ").append(request.path);
  if (!request.query.empty()) text.append("?").append(request.query);
  text.append(" HTTP/1.1\r\nHost: ").append(to.authority);
  const std::string_view connection = request.headers.get("connection");
  for (const auto& [name, value] : request.headers) {
    if (stays_here(name) || is_named_in(connection, name)) continue;
    if (!to.with_authorization && equal_ignoring_case(name, "authorization")) continue;
    if (to.rank && equal_ignoring_case(name, kRankHeader)) continue;
    text.append("\r\n").append(name).append(": ").append(value);
  }
  if (to.rank) text.append("\r\n").append(kRankHeader).append(": ").append(std::to_string(*to.rank));
  if (!request.body.empty() || request.method == "POST" || request.method == "PUT") {
    text.append("\r\nContent-Length: ").append(std::to_string(request.body.size()));
  }
  text.append("\r\n\r\n").append(request.body);
  return text;
}

}  // namespace kvrouter
