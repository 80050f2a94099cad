// Names: which block a worker means by an engine hash.
//
// Every block goes by the name under which it was first stored (its common name, in the run store and the name table),
// or by none (kNoName) if that name stands for another block already.  Workers that use other names have aliases.
#include <algorithm>

#include "index/tree.h"

namespace kvrouter {
bool Tree::holds_by_common_name(WorkerId worker, BlockId block) {
  const NodeId node = runs_.node(block);
  return coverage(node, worker) > block - nodes_.info(node).start && workers_[worker].by_common_name(block);
}

std::optional<BlockId> Tree::find_held(WorkerId worker, EngineHash name) {
  const WorkerNames& names = workers_[worker];
  if (!names.plain()) {
    if (const BlockId* block = names.aliases.find(name)) return *block;
  }
  if (name == kNoName) return std::nullopt;
  const BlockId block = names_.find(name);
  if (block == NameTable::kNone || !holds_by_common_name(worker, block)) return std::nullopt;
  return block;
}

void Tree::name_standing_block(WorkerId worker, EngineHash name, BlockId block) {
  WorkerNames& names = workers_[worker];
  EngineHash& common = runs_.engine(block);
  if (names.plain() && common == name && name != kNoName) return;  // the usual case

  const std::optional<BlockId> known = find_held(worker, name);
  if (known == block) return;
  if (known) {
    contradicted_ = true;
    return;
  }
  const NodeId node = runs_.node(block);
  const std::uint32_t offset = block - nodes_.info(node).start;
  const bool held = coverage(node, worker) > offset;
  if (common == name && name != kNoName) {
    if (held) names.add_common_name(block);
    return;
  }
  if (!held && coverage_of_others(node, worker) <= offset) {  // nobody holds it: its name is free to change
    if (common != kNoName) names_.erase(common, block);
    NameTable::Place place;
    names_.find_place(name, place);
    name_new_block(worker, place, name, block);
    return;
  }
  names.add_alias(name, block, held);
}

void Tree::name_new_block(WorkerId worker, NameTable::Place& place, EngineHash name, BlockId block) {
  WorkerNames& names = workers_[worker];
  runs_.engine(block) = name;
  if (!names.plain() && names.aliases.find(name)) {
    contradicted_ = true;
  } else if (name != kNoName) {
    const BlockId other = names_.insert(place, name, block);
    if (other == NameTable::kNone) return;
    contradicted_ = contradicted_ || holds_by_common_name(worker, other);
  }
  runs_.engine(block) = kNoName;
  if (!contradicted_) names.add_alias(name, block, false);
}

void Tree::forget_names(BlockId begin, BlockId end) {
  PlacesAhead places(names_, end - begin, [&](std::size_t i) { return runs_.engine(begin + static_cast<BlockId>(i)); });
  for (BlockId block = begin; block < end; ++block) {
    NameTable::Place& place = places.next();
    if (runs_.engine(block) != kNoName) names_.erase(place, block);
  }
}

void Tree::add_orphan(WorkerNames& names, EngineHash parent, StoredBlock block) {
  if (names.orphans.size() >= max_orphans_) {
    ++orphans_dropped_;
  } else {
    names.orphans.add(parent, block);
  }
}

void Tree::remove(WorkerId worker, std::span<const EngineHash> engine_hashes) {
  WorkerNames& names = workers_[worker];
  lost_.clear();
  PlacesAhead places(names_, engine_hashes.size(), [&](std::size_t i) { return engine_hashes[i]; });
  for (const EngineHash name : engine_hashes) {
    NameTable::Place& place = places.next();
    if (!names.plain()) {
      if (const BlockId* alias = names.aliases.find(name)) {
        const BlockId block = *alias;
        if (names.drop_alias(name, block)) lost_.push_back(block);
        continue;
      }
    }
    const BlockId block = name == kNoName ? NameTable::kNone : names_.find(place, name);
    if (block != NameTable::kNone && holds_by_common_name(worker, block)) {
      if (names.drop_common_name(block)) lost_.push_back(block);
    } else if (!names.orphans.remove(name)) {
      ++unknown_removals_;
    }
  }
  lose_blocks(worker, lost_);
  keep_limit(worker);  // splits have made nodes
}

std::vector<EngineHash> Tree::worker_blocks(WorkerId worker) {
  std::vector<EngineHash> held;
  for (NodeId node = NodePool::kFirst; node < nodes_.end(); ++node) {
    if (!in_tree(node)) continue;
    const BlockId start = nodes_.info(node).start;
    const BlockId end = start + coverage(node, worker);
    for (BlockId block = start; block < end; ++block) {
      if (workers_[worker].by_common_name(block) && runs_.engine(block) != kNoName) held.push_back(runs_.engine(block));
    }
  }
  workers_[worker].aliases.for_each([&](EngineHash name, BlockId) { held.push_back(name); });
  workers_[worker].orphans.for_each([&](EngineHash name) { held.push_back(name); });
  std::sort(held.begin(), held.end());
  return held;
}

void Tree::add_to(PrefixIndexStats& stats) const {
  stats.blocks += num_blocks_;
  for (WorkerId w = 0; w < num_workers_; ++w) {
    stats.pairs += held_blocks(w);
    stats.orphans += workers_[w].orphans.size();
  }
  stats.orphans_dropped += orphans_dropped_;
  stats.unknown_removals += unknown_removals_;
  stats.contradictions += contradictions_;
  stats.memory_bytes += memory();
  stats.given_up_blocks += given_up_;
}

}  // namespace kvrouter
