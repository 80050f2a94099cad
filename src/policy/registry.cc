#include <array>

#include "policy/policies.h"

namespace kvrouter {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Policy> (*make)();
};

constexpr std::array kPolicies = {
    // sorted by name
    Entry{"adaptive", make_adaptive_policy},
    Entry{"cache_aware", make_cache_aware_policy},
    Entry{"least_loaded", make_least_loaded_policy},
    Entry{"linear", make_linear_policy},
    Entry{"power_of_two", make_power_of_two_policy},
    Entry{"prefill_decode", make_prefill_decode_policy},
    Entry{"prefill_tokens_x_batch", make_prefill_tokens_x_batch_policy},
    Entry{"random", make_random_policy},
    Entry{"round_robin", make_round_robin_policy},
    Entry{"session", make_session_policy},
};

}  // namespace

std::unique_ptr<Policy> make_policy(std::string_view name) {
  for (const Entry& entry : kPolicies) {
    if (entry.name == name) return entry.make();
  }
  return nullptr;
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kPolicies) names.emplace_back(entry.name);
  return names;
}

}  // namespace kvrouter
