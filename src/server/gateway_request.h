// What the gateway reads of a request's body: for which model it is, and what its prompt is made of.  The body itself
// goes to the worker as it came.
#pragma once

#include <string>
#include <vector>

#include "kvrouter/block_hash.h"

namespace kvrouter {

struct GatewayRequest {
  std::string model;  // empty: not said
  bool stream = false;
  std::vector<TokenId> tokens;  // the prompt, where it was given as token ids
  // Else the body to ask a worker's POST /tokenize with, which also names the prompt in a cache; empty where the prompt
  // cannot be told in tokens (images, none at all).
  std::string to_tokenize;
};

// Empty on success, else what is wrong with the body.  Of several prompts in one request, the first counts.
std::string parse_gateway_request(const std::string& body, GatewayRequest& out);

}  // namespace kvrouter
