// Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): each session has an order of
// workers of its own, and goes to the first that is not above its bound.  The order is by rendezvous hashing, and a
// request's session is its first block.
#include <cmath>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

// No worker may have more than this many times the mean of requests in flight.
constexpr double kBound = 1.25;

std::uint64_t mix(std::uint64_t key, std::uint64_t worker) {
  std::uint64_t x = key ^ (worker + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

class SessionPolicy final : public Policy {
 public:
  std::string_view name() const override { return "session"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    double total = 1;
    for (const WorkerView& worker : workers) total += static_cast<double>(worker.in_flight);
    const double bound = std::ceil(kBound * total / static_cast<double>(workers.size()));
    const std::uint64_t key = request.prefixes.empty() ? random.next() : request.prefixes.front();
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId w) {
      const double rank = static_cast<double>(mix(key, w) >> 11) * 0x1p-53;  // 0 to 1
      // Workers at their bound come last, and among themselves in the same order.
      return static_cast<double>(worker.in_flight) + 1 > bound ? rank - 1 : rank;
    });
  }
};

}  // namespace

std::unique_ptr<Policy> make_session_policy() {
  return std::make_unique<SessionPolicy>();
}

}  // namespace kvrouter
