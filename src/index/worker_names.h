// What one worker calls its blocks, where that differs from the name that the block goes by.
//
// A block goes by the engine hash under which it was first stored; workers whose engines agree need nothing else.
// Where they do not (hash seeds of their own), or a worker calls one block by two names, the other names are aliases.
// For a block with aliases a use says by how many of them the worker holds it, and whether by the common name too.
//
// Invariant: a name is an alias only while the worker holds the block; a use exists only for blocks with aliases.
#pragma once

#include <cstdint>

#include "index/flat_map.h"
#include "index/orphans.h"
#include "index/run_store.h"

namespace kvrouter {

struct WorkerNames {
  struct Use {
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
    ++uses.insert(block, Use{0, held}).first->aliases;
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

  void clear() {
    aliases.clear();
    uses.clear();
    orphans.clear();
  }
};

}  // namespace kvrouter
