// What policies share: names of prefixes, and the batch that is decided one request after the other.
#include "kvrouter/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace kvrouter {
namespace {

// A batch too small to give every worker two requests cannot be balanced and keep groups together: there a worker may
// take this share of the largest group.
constexpr std::size_t kRequestsAWorker = 2;
constexpr double kShareOfGroup = 0.25;

// The tokens that one worker may get of the batch.
double token_limit(const Batch& batch, std::size_t num_workers, double limit) {
  double total = 0;
  for (std::size_t i = 0; i < batch.size(); ++i) total += static_cast<double>(batch.request(i).num_tokens);
  const double balanced = limit * total / static_cast<double>(num_workers);
  if (batch.size() >= kRequestsAWorker * num_workers) return balanced;

  // Requests of the same first block are of one group, for want of a better sign.
  std::vector<std::pair<PrefixHash, double>> groups;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const RoutingRequest request = batch.request(i);
    if (request.prefixes.empty()) continue;
    groups.emplace_back(request.prefixes.front(), static_cast<double>(request.num_tokens));
  }
  std::sort(groups.begin(), groups.end());
  double largest = 0, sum = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    sum = (i > 0 && groups[i].first == groups[i - 1].first ? sum : 0) + groups[i].second;
    largest = std::max(largest, sum);
  }
  return std::max(balanced, kShareOfGroup * largest);
}

}  // namespace

void hash_prefixes(std::span<const LocalHash> blocks, std::span<PrefixHash> out) {
  PrefixHash prefix = 0x9E3779B97F4A7C15ull;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    prefix = (prefix ^ blocks[i]) * 0xBF58476D1CE4E5B9ull;  // splitmix64's finalizer, chained
    prefix = (prefix ^ (prefix >> 27)) * 0x94D049BB133111EBull;
    out[i] = prefix ^= prefix >> 31;
  }
}

void Policy::choose_batch(Batch& batch, Random& random, std::span<double> scores) {
  thread_local std::vector<double> tokens;
  tokens.assign(scores.size(), 0.0);
  double limit = batch_token_limit();
  if (std::isfinite(limit)) limit = token_limit(batch, scores.size(), limit);

  for (std::size_t i = 0; i < batch.size(); ++i) {
    const RoutingRequest request = batch.request(i);
    const double size = static_cast<double>(request.num_tokens);
    const std::span<WorkerView> workers = batch.workers(i);
    // Of the workers that have room for it; if none has, of those with the fewest tokens.
    double fewest = std::numeric_limits<double>::infinity();
    for (WorkerId w = 0; w < workers.size(); ++w) {
      if (workers[w].available) fewest = std::min(fewest, tokens[w]);
    }
    const double most = std::max(limit - size, fewest);
    for (WorkerId w = 0; w < workers.size(); ++w) {
      workers[w].available = workers[w].available && tokens[w] <= most;
    }
    const WorkerId worker = choose(request, workers, random, scores);
    tokens[worker] += size;
    batch.assign(i, worker);
  }
}

}  // namespace kvrouter
