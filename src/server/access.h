// Who may ask for what: bearer tokens, and requests that a browser sends for a foreign page.
#pragma once

#include <string>
#include <string_view>

#include "net/http_headers.h"

namespace kvrouter {

struct AccessTokens {
  std::string api;    // empty: the API is open
  std::string admin;  // empty: admin calls need the API's token, and without that are for loopback servers only
  bool loopback = true;
};

enum class AccessLevel { kPublic, kApi, kAdmin };

struct AccessAnswer {
  unsigned status = 0;  // 0: granted
  std::string_view reason;
};

// Takes a time that depends on the lengths alone.
bool equal_in_constant_time(std::string_view given, std::string_view secret);

AccessAnswer check_access(const AccessTokens& tokens, AccessLevel level, const HttpHeaders& headers);

}  // namespace kvrouter
