// A decision as JSON, with a row for each worker that there is.
#pragma once

#include <nlohmann/json.hpp>

#include "server/fleet.h"

namespace kvrouter {

inline nlohmann::json decision_json(const Decision& decision, const Fleet& fleet) {
  nlohmann::json workers = nlohmann::json::array();
  for (WorkerId w = 0; w < decision.scores.size(); ++w) {
    if (!fleet.worker(w).present) continue;
    workers.push_back({{"worker_id", w},
                       {"score", decision.scores[w]},
                       {"overlap_blocks", decision.overlap_blocks[w]},
                       {"kv_usage", decision.loads[w].kv_usage},
                       {"waiting", decision.loads[w].waiting}});
  }
  return {{"worker_id", decision.choice.worker},
          {"overlap_blocks", decision.choice.overlap_blocks},
          {"num_blocks", decision.num_blocks},
          {"num_tokens", decision.num_tokens},
          {"workers", std::move(workers)}};
}

}  // namespace kvrouter
