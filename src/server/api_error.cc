#include "server/api_error.h"

#include <nlohmann/json.hpp>

namespace kvrouter {
namespace {

const char* type_of(unsigned status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return status < 500 ? "invalid_request_error" : "upstream_error";
  }
}

}  // namespace

std::string api_error_json(unsigned status, std::string_view message) {
  const nlohmann::json error = {
      {"error", {{"message", message}, {"type", type_of(status)}, {"param", nullptr}, {"code", status}}}};
  return error.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string api_error_event(unsigned status, std::string_view message) {
  return "data: " + api_error_json(status, message) + "\n\n";
}

}  // namespace kvrouter
