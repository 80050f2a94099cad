// What one worker calls its blocks, where that differs from the name that the block goes by.
//
// A block goes by the engine hash under which it was first stored; workers whose engines agree need nothing else.
// Where they do not (hash seeds of their own), or a worker calls one block by two names, the other names are aliases.
// For a block with aliases a use says by how many of them the worker holds it, and whether by the common name too.
//
// Invariant: a name is an alias only while the worker holds the block; a use exists only for blocks with aliases.
#pragma once

#include <cstdint>
#include <vector>

#include "index/flat_map.h"
#include "index/orphans.h"
#include "index/run_store.h"

namespace kvrouter {

struct WorkerNames {
  struct Use {
    EngineHash aliases_xor;  // of their names: the name itself where there is one, as there mostly is
    std::uint32_t aliases;
    bool common;
  };
  FlatMap<BlockId> aliases;
  FlatMap<Use> uses;  // by block
  Orphans orphans;

  bool plain() const { return aliases.empty(); }

  // The worker calls `block` by `name` too.  `held`: it held the block before by the common name alone.
  void add_alias(EngineHash name, BlockId block, bool held) {
    aliases.insert(name, block);
    Use* use = uses.insert(block, Use{0, 0, held}).first;
    use->aliases_xor ^= name;
    ++use->aliases;
  }
  // Whether the worker holds a block, that it does hold, by the block's common name.
  bool by_common_name(BlockId block) const {
    const Use* use = uses.find(block);
    return !use || use->common;
  }
  void add_common_name(BlockId block) {
    if (Use* use = uses.find(block)) use->common = true;
  }

  // The worker no longer calls `block` so; true if it has no name for it any more.
  bool drop_alias(EngineHash name, BlockId block) {
    aliases.erase(name);
    Use* use = uses.find(block);
    use->aliases_xor ^= name;
    if (--use->aliases > 0) return false;
    const bool last = !use->common;
    uses.erase(block);
    return last;
  }
  bool drop_common_name(BlockId block) {
    Use* use = uses.find(block);
    if (!use) return true;
    use->common = false;
    return false;
  }

  // The worker has no name any more for the blocks [begin, end).
  void drop_blocks(BlockId begin, BlockId end) {
    bool all_found = true;
    for (BlockId block = begin; block < end; ++block) {
      const Use* use = uses.find(block);
      if (!use) continue;
      if (use->aliases == 1) {
        aliases.erase(use->aliases_xor);
      } else {
        all_found = false;
      }
      uses.erase(block);
    }
    if (all_found) return;
    std::vector<EngineHash> rest;
    aliases.for_each([&](EngineHash name, BlockId block) {
      if (block >= begin && block < end) rest.push_back(name);
    });
    for (const EngineHash name : rest) aliases.erase(name);
  }

  // About what they take, in bytes; a FlatMap is two thirds full on average.
  std::size_t bytes() const { return aliases.size() * 36 + uses.size() * 48 + orphans.size() * kOrphanBytes; }
  static constexpr std::size_t kOrphanBytes = 160;
  std::size_t counted_bytes = 0;  // what the tree's sum has of it

  void clear() {
    aliases.clear();
    uses.clear();
    orphans.clear();
  }
};

}  // namespace kvrouter
