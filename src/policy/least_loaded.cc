// The worker with the fewest requests in flight, by the router's own account; ties at random.
#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class LeastLoadedPolicy final : public Policy {
 public:
  std::string_view name() const override { return "least_loaded"; }

  WorkerId choose(const RoutingRequest&, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    return choose_best(workers, random, scores,
                       [](const WorkerView& worker, WorkerId) { return -static_cast<double>(worker.in_flight); });
  }

  double batch_token_limit() const override { return std::numeric_limits<double>::infinity(); }
};

}  // namespace

std::unique_ptr<Policy> make_least_loaded_policy() {
  return std::make_unique<LeastLoadedPolicy>();
}

}  // namespace kvrouter
