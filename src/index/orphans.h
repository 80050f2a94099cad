// Blocks of one worker whose place in the tree is not known, because the block before them is not.
//
// Each orphan waits under its parent's engine hash; when that block is placed, take_children() gives those to place
// next.  Invariant: an engine hash is an orphan at most once, and is in exactly one list of children.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvrouter/kv_event.h"

namespace kvrouter {

class Orphans {
 public:
  bool empty() const { return parent_of_.empty(); }
  std::size_t size() const { return parent_of_.size(); }

  void add(EngineHash parent, StoredBlock block) {
    remove(block.engine);
    parent_of_[block.engine] = parent;
    children_[parent].push_back(block);
  }

  // False if it was not an orphan.
  bool remove(EngineHash engine) {
    const auto found = parent_of_.find(engine);
    if (found == parent_of_.end()) return false;
    const auto list = children_.find(found->second);
    std::erase_if(list->second, [&](const StoredBlock& block) { return block.engine == engine; });
    if (list->second.empty()) children_.erase(list);
    parent_of_.erase(found);
    return true;
  }

  // The blocks that waited for `parent`; they are orphans no more.
  std::vector<StoredBlock> take_children(EngineHash parent) {
    const auto found = children_.find(parent);
    if (found == children_.end()) return {};
    std::vector<StoredBlock> blocks = std::move(found->second);
    children_.erase(found);
    for (const StoredBlock& block : blocks) parent_of_.erase(block.engine);
    return blocks;
  }

  // Calls f(engine hash) for each.
  template <typename F>
  void for_each(F f) const {
    for (const auto& [engine, parent] : parent_of_) f(engine);
  }

  // Calls f(parent, block) for each.
  template <typename F>
  void for_each_child(F f) const {
    for (const auto& [parent, blocks] : children_) {
      for (const StoredBlock& block : blocks) f(parent, block);
    }
  }

  void clear() { *this = {}; }

 private:
  std::unordered_map<EngineHash, EngineHash> parent_of_;
  std::unordered_map<EngineHash, std::vector<StoredBlock>> children_;
};

}  // namespace kvrouter
