// Placeholder.
#include <algorithm>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class AdaptivePolicy final : public Policy {
 public:
  std::string_view name() const override { return "adaptive"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double miss = miss_tokens(request, worker.expected_blocks);
      return -(worker.prefill_tokens + 2 * miss + 50.0 * static_cast<double>(worker.in_flight)) *
             worker.seconds_per_token;
    });
  }
};

}  // namespace

std::unique_ptr<Policy> make_adaptive_policy() {
  return std::make_unique<AdaptivePolicy>();
}

}  // namespace kvrouter
