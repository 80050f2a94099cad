// The cache-aware policy of SGLang's router: while the fleet is balanced, the worker that holds the longest prefix, if
// that is a good part of the request, else the one that caches least; out of balance, the shortest queue.
#include <algorithm>
#include <limits>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

// The router's defaults, as its documentation gives them.
constexpr double kMatch = 0.3;
constexpr std::int64_t kAbsoluteImbalance = 64;
constexpr double kRelativeImbalance = 1.5;

class CacheAwarePolicy final : public Policy {
 public:
  std::string_view name() const override { return "cache_aware"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    std::int64_t most = 0, least = std::numeric_limits<std::int64_t>::max();
    std::uint32_t longest = 0;
    for (const WorkerView& worker : workers) {
      if (!worker.available) continue;
      most = std::max(most, worker.in_flight);
      least = std::min(least, worker.in_flight);
      longest = std::max(longest, worker.overlap_blocks);
    }
    if (most - least > kAbsoluteImbalance &&
        static_cast<double>(most) > kRelativeImbalance * static_cast<double>(least)) {
      return choose_best(workers, random, scores,
                         [](const WorkerView& worker, WorkerId) { return -static_cast<double>(worker.in_flight); });
    }
    const double match = static_cast<double>(longest * request.block_size) / static_cast<double>(request.num_tokens);
    if (match > kMatch) {
      return choose_best(workers, random, scores,
                         [](const WorkerView& worker, WorkerId) { return static_cast<double>(worker.overlap_blocks); });
    }
    return choose_best(workers, random, scores,
                       [](const WorkerView& worker, WorkerId) { return -static_cast<double>(worker.cached_blocks); });
  }
};

}  // namespace

std::unique_ptr<Policy> make_cache_aware_policy() {
  return std::make_unique<CacheAwarePolicy>();
}

}  // namespace kvrouter
