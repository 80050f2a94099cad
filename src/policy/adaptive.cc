// The worker where the request costs least, in the time of that worker:
//
//   cost = slowness * (ahead + miss * (1 + E + 3 B + 0.03 n))
//   ahead = 1.5 * queued - 0.5 * B * own + output * (0.0004 * context + 0.5 * n)
//
// in tokens of prefill: `queued` still to be computed at the worker, of which `own` are of this request's own prompt,
// sent there shortly before; `miss` of the request that it neither holds nor was sent; n requests are in flight there
// with `context` tokens of prompts; `output` is what a request is expected to generate (hinted, or learnt), half of
// which lies ahead of a request in flight.  E is 1 where the cache is full, so that what is computed anew pushes out
// what will be missed, else 0.  B is 0 while some worker has nothing queued, and goes to 1 as the shortest queue grows:
// then a prefill done twice delays everybody.  `slowness` is a worker's learnt time a token of prefill, relative to the
// mean of the fleet, and 1 while it is near that: what is learnt from a few prefills scatters by as much.
//
// A hot prefix moves to one more worker by itself, when waiting for its home costs more than a prefill elsewhere.
// Where the numbers come from: docs/policies.md.
#include <algorithm>
#include <limits>
#include <vector>

#include "policy/choice.h"
#include "policy/policies.h"

namespace kvrouter {
namespace {

// What is queued delays this request and those that come after it...
constexpr double kQueued = 1.5;
// ... but for what a sibling has queued of this request's own prompt, which would have to be computed anywhere.
constexpr double kOwn = 0.5;
// While some worker is idle a prefill done twice costs nobody anything; while none is, it delays the whole fleet.
constexpr double kBusy = 3;
// A decode step reads the KV of each context token, and computes one token a request: half of that in tokens of
// prefill, as a request in flight has half of its output ahead on average.
constexpr double kContext = 0.0004;
constexpr double kSequence = 0.5;
constexpr double kEviction = 1.0;
constexpr double kInterference = 0.03;  // of the others' wait for a prefill, what cannot be hidden in their steps
constexpr double kUnknownOutput = 300;  // tokens

// Workers within this factor of the mean count as equally fast; from the second on, what was learnt counts in full.
constexpr double kAlike = 1.4, kUnlike = 2;

// The same of a batch, whose own work keeps the fleet busy.
constexpr double kBatchBusy = 1;
// So many samples of a prompt are kept together in a batch: more save little prefill, and samples of a prompt tend to
// be long together.
constexpr std::size_t kTogether = 8;
// A worker is filled up to this share of its part of a batch before a group is split.
constexpr double kFill = 1.02;

double output_of(const RoutingRequest& request) {
  return request.expected_output > 0 ? request.expected_output : kUnknownOutput;
}

double decode_work(double output, double context, double sequences) {
  return output * (kContext * context + kSequence * sequences);
}

// Ahead at the worker, in tokens of prefill.
double work_ahead(const WorkerView& worker, double output) {
  return kQueued * worker.prefill_tokens +
         decode_work(output, worker.context_tokens, static_cast<double>(worker.in_flight));
}

// What a prefill costs beside its own time, relative to that: to those whose blocks it evicts, and to those whose
// steps it stretches.
double worker_factor(const WorkerView& worker) {
  return (worker.evicting ? kEviction : 0.0) + kInterference * static_cast<double>(worker.in_flight);
}

double mean_seconds_per_token(std::span<const WorkerView> workers) {
  double sum = 0;
  std::size_t count = 0;
  for (const WorkerView& worker : workers) {
    if (!worker.available) continue;
    sum += worker.seconds_per_token;
    ++count;
  }
  return sum / static_cast<double>(count);
}

// How slow a worker counts as, relative to the others.  `mean`: seconds a token over the fleet, > 0.
double slowness(const WorkerView& worker, double mean) {
  const bool slow = worker.seconds_per_token > mean;
  const double factor = slow ? worker.seconds_per_token / mean : mean / worker.seconds_per_token;
  double counted = factor;
  if (factor < kAlike) {
    counted = 1;
  } else if (factor < kUnlike) {
    counted = 1 + (factor - kAlike) / (kUnlike - kAlike) * (kUnlike - 1);
  }
  return slow ? counted : 1 / counted;
}

// From 0, some worker has nothing queued, to 1, all queues are long against the request.
double busyness(const RoutingRequest& request, std::span<const WorkerView> workers) {
  double shortest = std::numeric_limits<double>::infinity();
  for (const WorkerView& worker : workers) {
    if (worker.available) shortest = std::min(shortest, worker.prefill_tokens);
  }
  return shortest / (shortest + static_cast<double>(request.num_tokens));
}

// Number of leading prefixes in common.
std::size_t shared_blocks(const RoutingRequest& a, const RoutingRequest& b) {
  std::size_t low = 0, high = std::min(a.prefixes.size(), b.prefixes.size());
  while (low < high) {
    const std::size_t middle = (low + high + 1) / 2;
    if (a.prefixes[middle - 1] == b.prefixes[middle - 1]) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Requests of a batch that share most of their prompts, as a range of BatchPlan::order.
struct Group {
  std::size_t first, last;
  double work;  // tokens of prefill, the shared ones once, and decode
};

// Working memory of a batch, one a thread.
struct BatchPlan {
  std::vector<RoutingRequest> requests;
  std::vector<std::uint32_t> order;  // such that requests that share prefixes are neighbours
  std::vector<double> added;         // work that each request of `order` adds behind its neighbour
  std::vector<Group> groups;
  std::vector<double> ahead;  // at each worker, what this batch sends included
  std::vector<double> room;   // what each worker should have ahead in the end
  double mean_ahead = 0;      // the same of a worker of average speed
  double mean_seconds = 0;    // a token of prefill

  void read(const Batch& batch);
  void find_groups();
  void share_out(std::span<const WorkerView> workers);
};

void BatchPlan::read(const Batch& batch) {
  requests.clear();
  order.clear();
  for (std::size_t i = 0; i < batch.size(); ++i) {
    requests.push_back(batch.request(i));
    order.push_back(static_cast<std::uint32_t>(i));
  }
  std::sort(order.begin(), order.end(), [&](std::uint32_t x, std::uint32_t y) {
    const RoutingRequest &a = requests[x], &b = requests[y];
    const std::size_t depth = shared_blocks(a, b);
    if (depth < a.prefixes.size() && depth < b.prefixes.size()) return a.prefixes[depth] < b.prefixes[depth];
    return a.prefixes.size() != b.prefixes.size() ? a.prefixes.size() < b.prefixes.size() : x < y;
  });
}

void BatchPlan::find_groups() {
  groups.clear();
  added.clear();
  for (std::size_t i = 0; i < order.size(); ++i) {
    const RoutingRequest& request = requests[order[i]];
    const double output = output_of(request);
    double miss = static_cast<double>(request.num_tokens);
    bool same_group = false;
    if (i > 0) {
      const RoutingRequest& before = requests[order[i - 1]];
      const std::size_t shared = shared_blocks(request, before) * request.block_size;
      same_group = 2 * shared >= std::min(request.num_tokens, before.num_tokens);
      if (same_group) miss -= static_cast<double>(shared);
    }
    if (!same_group) groups.push_back({i, i, 0});
    added.push_back(miss + decode_work(output, static_cast<double>(request.num_tokens) + output / 2, 1));
    groups.back().last = i + 1;
    groups.back().work += added.back();
  }
  std::sort(groups.begin(), groups.end(),
            [](const Group& a, const Group& b) { return a.work != b.work ? a.work > b.work : a.first < b.first; });
}

void BatchPlan::share_out(std::span<const WorkerView> workers) {
  double work = 0, speed = 0, available = 0;
  mean_seconds = mean_seconds_per_token(workers);
  for (const Group& group : groups) work += group.work;
  ahead.clear();
  for (const WorkerView& worker : workers) {
    ahead.push_back(work_ahead(worker, kUnknownOutput));
    if (!worker.available) continue;
    work += ahead.back();
    speed += 1 / slowness(worker, mean_seconds);
    ++available;
  }
  mean_ahead = work / available;
  room.clear();
  for (const WorkerView& worker : workers) room.push_back(kFill * work / slowness(worker, mean_seconds) / speed);
}

class AdaptivePolicy final : public Policy {
 public:
  std::string_view name() const override { return "adaptive"; }

  WorkerId choose(const RoutingRequest& request, std::span<const WorkerView> workers, Random& random,
                  std::span<double> scores) override {
    const double output = output_of(request);
    const double busy = busyness(request, workers);
    const double mean = mean_seconds_per_token(workers);
    return choose_best(workers, random, scores, [&](const WorkerView& worker, WorkerId) {
      const double miss = miss_tokens(request, worker.expected_blocks);
      const double own = std::min(miss_tokens(request, worker.overlap_blocks) - miss, worker.prefill_tokens);
      const double ahead = work_ahead(worker, output) - kOwn * busy * own;
      return -slowness(worker, mean) * (ahead + miss * (1 + worker_factor(worker) + kBusy * busy));
    });
  }

  // Jointly: the groups with the most work first, each kept together as far as its worker's share of the batch goes.
  void choose_batch(Batch& batch, Random& random, std::span<double> scores) override {
    if (batch.size() == 0) return;
    thread_local BatchPlan plan;
    plan.read(batch);
    plan.find_groups();
    plan.share_out(batch.workers(0));
    for (const Group& group : plan.groups) {
      for (std::size_t i = group.first; i < group.last;) i = place(plan, group, i, batch, random, scores);
    }
  }

 private:
  // Sends some requests of the group from the i-th on to the worker where that costs least; returns the next one.
  static std::size_t place(BatchPlan& plan, const Group& group, std::size_t i, Batch& batch, Random& random,
                           std::span<double> scores) {
    const RoutingRequest& request = plan.requests[plan.order[i]];
    const std::span<const WorkerView> workers = batch.workers(plan.order[i]);
    const double busy = plan.mean_ahead / (plan.mean_ahead + static_cast<double>(request.num_tokens));
    const WorkerId worker = choose_best(workers, random, scores, [&](const WorkerView& row, WorkerId w) {
      const double miss = miss_tokens(request, row.expected_blocks);
      return -slowness(row, plan.mean_seconds) * (plan.ahead[w] + miss * (1 + worker_factor(row) + kBatchBusy * busy));
    });
    const double output = output_of(request);
    plan.ahead[worker] += miss_tokens(request, workers[worker].expected_blocks) +
                          decode_work(output, static_cast<double>(request.num_tokens) + output / 2, 1);
    batch.assign(plan.order[i], worker);
    // At least as many as make the prefill worth while.
    const double worth = static_cast<double>(request.num_tokens) / plan.added[i + 1 < group.last ? i + 1 : i];
    const std::size_t together = std::max(kTogether, static_cast<std::size_t>(worth));
    const std::size_t last = std::min(group.last, i + together);
    for (++i; i < last && plan.ahead[worker] + plan.added[i] <= plan.room[worker]; ++i) {
      plan.ahead[worker] += plan.added[i];
      batch.assign(plan.order[i], worker);
    }
    return i;
  }
};

}  // namespace

std::unique_ptr<Policy> make_adaptive_policy() {
  return std::make_unique<AdaptivePolicy>();
}

}  // namespace kvrouter
