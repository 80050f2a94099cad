// The definition of a prefix match in the plainest code, for one fleet: a worker's overlap is the number of leading
// blocks of the request that it holds.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "kvrouter/prefix_index.h"

namespace kvrouter {

class NaiveIndex {
 public:
  explicit NaiveIndex(std::size_t num_workers) : workers_(num_workers) {}

  void store(WorkerId worker, std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) {
    for (const StoredBlock& block : blocks) {
      workers_[worker].children[{parent, block.local}] = block.engine;
      workers_[worker].held.insert(block.engine);
      parent = block.engine;
    }
  }
  void remove(WorkerId worker, std::span<const EngineHash> blocks) {
    for (const EngineHash block : blocks) workers_[worker].held.erase(block);
  }
  void clear(WorkerId worker) { workers_[worker].held.clear(); }
  const std::set<EngineHash>& held(WorkerId worker) const { return workers_[worker].held; }
  std::size_t held_blocks(WorkerId worker) const { return workers_[worker].held.size(); }

  std::vector<std::uint32_t> find_matches(std::span<const LocalHash> blocks) const {
    std::vector<std::uint32_t> overlap;
    for (const Worker& worker : workers_) {
      std::optional<EngineHash> at;
      std::uint32_t depth = 0;
      for (const LocalHash local : blocks) {
        const auto child = worker.children.find({at, local});
        if (child == worker.children.end() || !worker.held.contains(child->second)) break;
        at = child->second;
        ++depth;
      }
      overlap.push_back(depth);
    }
    return overlap;
  }

 private:
  struct Worker {
    std::map<std::pair<std::optional<EngineHash>, LocalHash>, EngineHash> children;  // of all blocks ever stored
    std::set<EngineHash> held;
  };
  std::vector<Worker> workers_;
};

}  // namespace kvrouter
