// The score of the NeMo-RL dynamic router integration guide:
//
//   score = 2 * overlap - kv_usage - waiting / max_waiting
//
// with overlap = matched blocks * block size / tokens of the request (0 to 1), kv_usage from 0 to 1, and the queue
// relative to the longest queue of the fleet (0 if no worker has one).  Ties are broken at random.
#include <algorithm>

#include "policy/policies.h"

namespace kvrouter {
namespace {

class LinearPolicy final : public Policy {
 public:
  std::string_view name() const override { return "linear"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    std::int64_t max_waiting = 0;
    for (const WorkerView& worker : workers) max_waiting = std::max(max_waiting, worker.waiting);
    // Divided, not multiplied by the reciprocal: 49 * (1/49) is not 1, and ties are over exact values.
    const double queue_scale = static_cast<double>(std::max<std::int64_t>(max_waiting, 1));
    const double num_tokens = static_cast<double>(request.num_tokens);

    WorkerId best = 0;
    std::uint64_t ties = 0;  // available workers with the best score so far
    for (WorkerId w = 0; w < workers.size(); ++w) {
      const WorkerView& worker = workers[w];
      const double overlap = static_cast<double>(worker.overlap_blocks * request.block_size) / num_tokens;
      scores[w] = 2.0 * overlap - worker.kv_usage - static_cast<double>(worker.waiting) / queue_scale;
      if (!worker.available) continue;
      if (ties == 0 || scores[w] > scores[best]) {
        best = w;
        ties = 1;
      } else if (scores[w] == scores[best] && random.next() % ++ties == 0) {
        best = w;  // each of k tied workers ends up chosen with probability 1/k
      }
    }
    return best;
  }
};

}  // namespace

std::unique_ptr<Policy> make_linear_policy() {
  return std::make_unique<LinearPolicy>();
}

}  // namespace kvrouter
