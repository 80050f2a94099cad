#include "server/access.h"

namespace kvrouter {
namespace {

std::string_view bearer_token(const HttpHeaders& headers) {
  std::string_view value = headers.get("authorization");
  constexpr std::string_view kScheme = "bearer ";
  if (value.size() < kScheme.size() || !equal_ignoring_case(value.substr(0, kScheme.size()), kScheme)) return {};
  value.remove_prefix(kScheme.size());
  while (value.starts_with(' ')) value.remove_prefix(1);
  return value;
}

// A browser names the page that made it ask; the dashboard's own page is at the host that is asked.
bool from_foreign_page(const HttpHeaders& headers) {
  std::string_view origin = headers.get("origin");
  if (origin.empty()) return false;
  const std::size_t scheme = origin.find("://");
  if (scheme == std::string_view::npos) return true;
  return !equal_ignoring_case(origin.substr(scheme + 3), headers.get("host"));
}

}  // namespace

bool equal_in_constant_time(std::string_view given, std::string_view secret) {
  unsigned difference = given.size() == secret.size() ? 0 : 1;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const unsigned char other = secret.empty() ? 0 : static_cast<unsigned char>(secret[i % secret.size()]);
    difference |= static_cast<unsigned char>(given[i]) ^ other;
  }
  // Keeps the compiler from ending the loop at the first difference.
  const volatile unsigned result = difference;
  return result == 0;
}

AccessAnswer check_access(const AccessTokens& tokens, AccessLevel level, const HttpHeaders& headers) {
  if (level == AccessLevel::kPublic) return {};
  const std::string_view given = bearer_token(headers);
  const bool is_admin = !tokens.admin.empty() && equal_in_constant_time(given, tokens.admin);
  const bool is_api = !tokens.api.empty() && equal_in_constant_time(given, tokens.api);
  if (level == AccessLevel::kAdmin) {
    if (from_foreign_page(headers)) return {403, "admin calls from other sites' pages are refused"};
    if (is_admin) return {};
    if (!tokens.admin.empty()) return {is_api ? 403u : 401u, "admin calls need the admin token"};
    if (is_api) return {};
    if (!tokens.api.empty()) return {401, "the bearer token is missing or wrong"};
    if (tokens.loopback) return {};
    return {403, "admin calls are off, as there is no admin token: set --admin-token-file"};
  }
  if (tokens.api.empty() || is_api || is_admin) return {};
  return {401, "the bearer token is missing or wrong"};
}

}  // namespace kvrouter
