// Any of the workers, each with the same probability.
#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class RandomPolicy final : public Policy {
 public:
  std::string_view name() const override { return "random"; }
  bool uses_account() const override { return false; }

  WorkerId choose(const RoutingRequest&, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    return choose_best(workers, random, scores, [](const WorkerView&, WorkerId) { return 0.0; });
  }

  double batch_token_limit() const override { return std::numeric_limits<double>::infinity(); }
};

}  // namespace

std::unique_ptr<Policy> make_random_policy() {
  return std::make_unique<RandomPolicy>();
}

}  // namespace kvrouter
