#include <algorithm>
#include <cstdlib>
#include <vector>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

double knob(const char* name, double value) {
  const char* text = std::getenv(name);
  return text ? std::atof(text) : value;
}
const double kMiss = knob("A_F", 1.5);
const double kMissFree = knob("A_F0", 1.05);
const double kAlpha = knob("A_ALPHA", 0.0);
const double kContext = knob("A_K", 1e-3);
const double kSequence = knob("A_B", 0.5);
const double kChunk = knob("A_CHUNK", 16);
const double kSlack = knob("A_SLACK", 1.02);
const double kQueue = knob("A_Q", 1.0);
const double kOut = knob("A_O", 200);

class AdaptivePolicy final : public Policy {
 public:
  std::string_view name() const override { return "adaptive"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    const double output = request.expected_output > 0 ? request.expected_output : kOut;
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double miss = miss_tokens(request, worker.expected_blocks);
      const double n = static_cast<double>(worker.in_flight);
      return -worker.seconds_per_token *
             (work(worker, output) + miss * ((worker.evicting ? kMiss : kMissFree) + kAlpha * n));
    });
  }

  void choose_batch(Batch& batch, Random& random, std::span<double> scores) override;

 private:
  static double decode(double output, double context, double sequences) {
    return output * (kContext * context + kSequence * sequences);
  }
  static double work(const WorkerView& worker, double output) {
    return kQueue * worker.prefill_tokens +
           decode(output, worker.context_tokens, static_cast<double>(worker.in_flight));
  }
};

std::size_t shared(std::span<const PrefixHash> a, std::span<const PrefixHash> b) {
  std::size_t low = 0, high = std::min(a.size(), b.size());  // shares `low`; not more than `high`
  while (low < high) {
    const std::size_t middle = (low + high + 1) / 2;
    if (a[middle - 1] == b[middle - 1]) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

void AdaptivePolicy::choose_batch(Batch& batch, Random& random, std::span<double> scores) {
  const std::size_t n = batch.size();
  std::vector<std::uint32_t> order(n);
  for (std::size_t i = 0; i < n; ++i) order[i] = static_cast<std::uint32_t>(i);
  std::vector<RoutingRequest> requests;
  for (std::size_t i = 0; i < n; ++i) requests.push_back(batch.request(i));
  std::sort(order.begin(), order.end(), [&](std::uint32_t x, std::uint32_t y) {
    const auto a = requests[x].prefixes, b = requests[y].prefixes;
    const std::size_t depth = shared(a, b);
    if (depth < a.size() && depth < b.size()) return a[depth] < b[depth];
    return a.size() != b.size() ? a.size() < b.size() : x < y;
  });
  const auto cost = [&](const RoutingRequest& r) {
    const double output = r.expected_output > 0 ? r.expected_output : kOut;
    return decode(output, static_cast<double>(r.num_tokens) + output / 2, 1);
  };
  struct Group {
    std::size_t first, last;
    double weight;
  };
  std::vector<Group> groups;
  double total = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const RoutingRequest& r = requests[order[i]];
    bool same = false;
    double miss = static_cast<double>(r.num_tokens);
    if (i > 0) {
      const RoutingRequest& before = requests[order[i - 1]];
      const std::size_t tokens = shared(r.prefixes, before.prefixes) * r.block_size;
      same = 2 * tokens >= std::min(r.num_tokens, before.num_tokens);
      miss -= static_cast<double>(tokens);
    }
    if (!same) groups.push_back({i, i, 0});
    groups.back().last = i + 1;
    groups.back().weight += cost(r) + (same ? miss : static_cast<double>(r.num_tokens));
    total += cost(r) + (same ? miss : static_cast<double>(r.num_tokens));
  }
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.first < b.first;
  });

  std::vector<double> load(scores.size());
  {
    const auto rows = batch.workers(0);
    double sum = 0;
    std::size_t available = 0;
    for (std::size_t w = 0; w < rows.size(); ++w) {
      load[w] = work(rows[w], kOut);
      if (rows[w].available) sum += load[w], ++available;
    }
    total = (total + sum) / static_cast<double>(available);
  }
  const double target = total * kSlack;
  for (const Group& group : groups) {
    std::size_t i = group.first;
    while (i < group.last) {
      const auto rows = batch.workers(order[i]);
      const RoutingRequest& r = requests[order[i]];
      const WorkerId w = choose_best(rows, random, scores, [&](const WorkerView& worker, WorkerId id) {
        return -(load[id] + kMiss * miss_tokens(r, worker.expected_blocks)) * worker.seconds_per_token;
      });
      load[w] += miss_tokens(r, rows[w].expected_blocks);
      std::size_t count = 0;
      while (i < group.last &&
             (count == 0 || (static_cast<double>(count) < kChunk && load[w] + cost(requests[order[i]]) <= target))) {
        const RoutingRequest& next = requests[order[i]];
        load[w] += cost(next);
        if (count > 0)
          load[w] += static_cast<double>(next.num_tokens -
                                         shared(next.prefixes, requests[order[i - 1]].prefixes) * next.block_size);
        batch.assign(order[i], w);
        ++i;
        ++count;
      }
    }
  }
}

}  // namespace

std::unique_ptr<Policy> make_adaptive_policy() {
  return std::make_unique<AdaptivePolicy>();
}

}  // namespace kvrouter
