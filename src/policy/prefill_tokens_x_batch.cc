// The product of LMetric (Zhang et al., "LMetric: Simple is Better - Multiplication May Be All You Need for LLM Request
// Scheduling", 2026): tokens to prefill at the worker, the request's own included, times the size of its batch.  Each
// factor counts the request itself, so that neither is zero.
#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

class PrefillTokensTimesBatchPolicy final : public Policy {
 public:
  std::string_view name() const override { return "prefill_tokens_x_batch"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double prefill = worker.prefill_tokens + miss_tokens(request, worker.overlap_blocks);
      return -(prefill + 1) * static_cast<double>(worker.in_flight + 1);
    });
  }
};

}  // namespace

std::unique_ptr<Policy> make_prefill_tokens_x_batch_policy() {
  return std::make_unique<PrefillTokensTimesBatchPolicy>();
}

}  // namespace kvrouter
