// The best of the available workers, ties broken by precedence, or evenly at random.
#pragma once

#include <limits>
#include <span>

#include "kvrouter/policy.h"

namespace kvrouter {

// scores[w] = score(workers[w], w) for every worker; the available one with the highest wins.
// REQUIRES: some worker is available.
template <typename Score>
WorkerId choose_best(std::span<const WorkerView> workers, Random& random, std::span<double> scores, Score&& score) {
  WorkerId best = 0;
  std::uint64_t ties = 0;  // available workers with the best score so far
  for (WorkerId w = 0; w < workers.size(); ++w) {
    scores[w] = score(workers[w], w);
    if (!workers[w].available) continue;
    if (ties == 0 || scores[w] > scores[best] ||
        (scores[w] == scores[best] && workers[w].precedence > workers[best].precedence)) {
      best = w;
      ties = 1;
    } else if (scores[w] == scores[best] && workers[w].precedence == workers[best].precedence &&
               random.next() % ++ties == 0) {
      best = w;  // each of k tied workers ends up chosen with probability 1/k
    }
  }
  return best;
}

// Tokens of the request's prompt that a worker with these leading blocks would have to compute.
inline double miss_tokens(const RoutingRequest& request, std::uint32_t blocks) {
  const double hit = static_cast<double>(std::size_t{blocks} * request.block_size);
  const double tokens = static_cast<double>(request.num_tokens);
  return hit < tokens ? tokens - hit : 0.0;
}

}  // namespace kvrouter
