// What a worker holds, as stores that would bring another index to the same state.
#include <algorithm>
#include <unordered_map>

#include "index/tree.h"

namespace kvrouter {

std::vector<StoredChain> Tree::worker_chains(WorkerId worker) {
  const WorkerNames& names = workers_[worker];
  std::vector<NodeId> nodes;
  for (NodeId node = NodePool::kFirst; node < nodes_.end(); ++node) {
    if (in_tree(node) && coverage(node, worker) > 0) nodes.push_back(node);
  }
  // Parents first: what comes before its parent would be an orphan meanwhile, and of these there is a limit.
  std::sort(nodes.begin(), nodes.end(),
            [&](NodeId a, NodeId b) { return nodes_.info(a).depth < nodes_.info(b).depth; });
  std::unordered_multimap<BlockId, EngineHash> aliases;
  names.aliases.for_each([&](EngineHash name, BlockId block) { aliases.emplace(block, name); });
  // Of a block that the worker holds.
  const auto name_of = [&](BlockId block) {
    const EngineHash common = runs_.engine(block);
    if (common != kNoName && names.by_common_name(block)) return common;
    const auto alias = aliases.find(block);
    return alias == aliases.end() ? kNoName : alias->second;
  };

  std::vector<StoredChain> chains;
  for (const NodeId node : nodes) {
    const NodeInfo& info = nodes_.info(node);
    StoredChain chain;
    if (info.depth > 0) {
      const NodeId parent = space_owner_[nodes_.node(node)->parent.load(std::memory_order_relaxed)];
      const BlockId last = nodes_.info(parent).start + length(parent) - 1;
      // Where the worker has lost the block before, that block's common name is the best guess at what it will call it.
      const EngineHash name = coverage(parent, worker) == length(parent) ? name_of(last) : runs_.engine(last);
      if (name == kNoName) continue;
      chain.parent = name;
    }
    const std::uint32_t held = coverage(node, worker);
    std::vector<StoredChain> others;
    for (BlockId block = info.start; block < info.start + held; ++block) {
      const StoredBlock stored{runs_.locals(block)->load(std::memory_order_relaxed), name_of(block)};
      const auto [first, last] = aliases.equal_range(block);
      for (auto alias = first; alias != last; ++alias) {
        if (alias->second == stored.engine) continue;
        others.push_back(
            {chain.blocks.empty() ? chain.parent : chain.blocks.back().engine, {{stored.local, alias->second}}});
      }
      chain.blocks.push_back(stored);
    }
    chains.push_back(std::move(chain));
    std::move(others.begin(), others.end(), std::back_inserter(chains));
  }
  names.orphans.for_each_child(
      [&](EngineHash parent, const StoredBlock& block) { chains.push_back({parent, {block}}); });
  return chains;
}

}  // namespace kvrouter
