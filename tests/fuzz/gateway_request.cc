// Bodies of OpenAI requests, as the gateway reads them.
#include "server/gateway_request.h"

#include <nlohmann/json.hpp>
#include <string>

#include "fuzz.h"

namespace kvrouter::fuzz {

void fuzz_one(std::string_view input) {
  GatewayRequest request;
  if (!parse_gateway_request(std::string(input), request).empty()) return;
  FUZZ_CHECK(request.tokens.empty() || request.to_tokenize.empty());
  FUZZ_CHECK(request.tokens.size() <= input.size());
  FUZZ_CHECK(request.to_tokenize.empty() || nlohmann::json::accept(request.to_tokenize));
}

}  // namespace kvrouter::fuzz
