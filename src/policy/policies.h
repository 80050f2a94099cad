// The policies, one line each.  registry.cc gives them their names.
#pragma once

#include <memory>

#include "kvrouter/policy.h"

namespace kvrouter {

// score = 2 * overlap - kv_usage - waiting / max_waiting; the best score wins, ties at random.
std::unique_ptr<Policy> make_linear_policy();
// The workers in turn.
std::unique_ptr<Policy> make_round_robin_policy();

}  // namespace kvrouter
