// Of two workers drawn at random, the one with fewer requests in flight (Mitzenmacher, "The Power of Two Choices in
// Randomized Load Balancing", 2001).
#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class PowerOfTwoPolicy final : public Policy {
 public:
  std::string_view name() const override { return "power_of_two"; }

  WorkerId choose(const RoutingRequest&, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    const WorkerId first = draw(workers, random), second = draw(workers, random);
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId w) {
      if (w != first && w != second) return -std::numeric_limits<double>::infinity();
      return -static_cast<double>(worker.in_flight);
    });
  }

  double batch_token_limit() const override { return std::numeric_limits<double>::infinity(); }

 private:
  static WorkerId draw(std::span<const WorkerView> workers, Random& random) {
    WorkerId worker = 0;
    do {
      worker = static_cast<WorkerId>(random.next() % workers.size());
    } while (!workers[worker].available);
    return worker;
  }
};

}  // namespace

std::unique_ptr<Policy> make_power_of_two_policy() {
  return std::make_unique<PowerOfTwoPolicy>();
}

}  // namespace kvrouter
