// The score of the NeMo-RL dynamic router integration guide:
//
//   score = 2 * overlap - kv_usage - waiting / max_waiting
//
// with overlap = matched blocks * block size / tokens of the request (0 to 1), kv_usage from 0 to 1, and the queue
// relative to the longest queue of the fleet (0 if no worker has one).  Ties are broken at random.
#include <algorithm>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class LinearPolicy final : public Policy {
 public:
  std::string_view name() const override { return "linear"; }
  bool uses_account() const override { return false; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    std::int64_t max_waiting = 0;
    for (const WorkerView& worker : workers) max_waiting = std::max(max_waiting, worker.waiting);
    // Divided, not multiplied by the reciprocal: 49 * (1/49) is not 1, and ties are over exact values.
    const double queue_scale = static_cast<double>(std::max<std::int64_t>(max_waiting, 1));
    const double num_tokens = static_cast<double>(request.num_tokens);
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double overlap = static_cast<double>(worker.overlap_blocks * request.block_size) / num_tokens;
      return 2.0 * overlap - worker.kv_usage - static_cast<double>(worker.waiting) / queue_scale;
    });
  }
};

}  // namespace

std::unique_ptr<Policy> make_linear_policy() {
  return std::make_unique<LinearPolicy>();
}

}  // namespace kvrouter
