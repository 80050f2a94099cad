// The cost of NVIDIA Dynamo's KV router: prefill blocks that are not cached (the worker's queue and the request's
// own), plus blocks of the requests in flight there; the lowest cost, or at a temperature a softmax draw.
#include <cmath>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

// Dynamo's defaults.
constexpr double kOverlapWeight = 1.0;
constexpr double kTemperature = 0.0;

class PrefillDecodePolicy final : public Policy {
 public:
  std::string_view name() const override { return "prefill_decode"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    const double block = static_cast<double>(request.block_size);
    const double context = static_cast<double>(request.num_tokens);
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double prefill_blocks = (worker.prefill_tokens + miss_tokens(request, worker.overlap_blocks)) / block;
      const double decode_blocks = (worker.context_tokens + context) / block;
      const double cost = kOverlapWeight * prefill_blocks + decode_blocks;
      return kTemperature > 0 ? gumbel(random) - cost / kTemperature : -cost;
    });
  }

 private:
  // The highest of score + gumbel noise is a draw from the softmax of the scores.
  static double gumbel(Random& random) {
    const double uniform = (static_cast<double>(random.next() >> 11) + 0.5) * 0x1p-53;
    return -std::log(-std::log(uniform));
  }
};

}  // namespace

std::unique_ptr<Policy> make_prefill_decode_policy() {
  return std::make_unique<PrefillDecodePolicy>();
}

}  // namespace kvrouter
