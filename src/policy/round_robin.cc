#include <algorithm>
#include <atomic>
#include <limits>

#include "policy/policies.h"

namespace kvrouter {
namespace {

// The next worker in turn, lost ones left out.
class RoundRobinPolicy final : public Policy {
 public:
  std::string_view name() const override { return "round_robin"; }
  bool uses_account() const override { return false; }

  WorkerId choose(const RoutingRequest&, std::span<const WorkerView> workers, Random&,
                  std::span<double> scores) override {
    std::fill(scores.begin(), scores.end(), 0.0);
    WorkerId worker = 0;
    do {
      worker = static_cast<WorkerId>(turn_.fetch_add(1, std::memory_order_relaxed) % workers.size());
    } while (!workers[worker].available);
    return worker;
  }

  double batch_token_limit() const override { return std::numeric_limits<double>::infinity(); }

 private:
  std::atomic<std::uint64_t> turn_{0};
};

}  // namespace

std::unique_ptr<Policy> make_round_robin_policy() {
  return std::make_unique<RoundRobinPolicy>();
}

}  // namespace kvrouter
