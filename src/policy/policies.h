// The policies, one file each.  registry.cc gives them their names.
#pragma once

#include <memory>

#include "kvrouter/policy.h"

namespace kvrouter {

std::unique_ptr<Policy> make_adaptive_policy();
std::unique_ptr<Policy> make_cache_aware_policy();
std::unique_ptr<Policy> make_least_loaded_policy();
std::unique_ptr<Policy> make_linear_policy();
std::unique_ptr<Policy> make_power_of_two_policy();
std::unique_ptr<Policy> make_prefill_decode_policy();
std::unique_ptr<Policy> make_prefill_tokens_x_batch_policy();
std::unique_ptr<Policy> make_random_policy();
std::unique_ptr<Policy> make_round_robin_policy();
std::unique_ptr<Policy> make_session_policy();

}  // namespace kvrouter
