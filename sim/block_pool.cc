#include "sim/block_pool.h"

#include <bit>
#include <cassert>

namespace kvrouter::sim {

BlockPool::BlockPool(std::int32_t num_blocks, KvEvents* events)
    : num_blocks_(num_blocks),
      num_free_(num_blocks - 1),
      queue_(num_blocks),
      blocks_(static_cast<std::size_t>(num_blocks) + 1),
      slots_(std::bit_ceil(static_cast<std::size_t>(num_blocks) * 2)),
      mask_(slots_.size() - 1),
      events_(events) {
  for (BlockId id = 1; id <= num_blocks; ++id) {
    const BlockId next = id == num_blocks ? 1 : id + 1;
    blocks_[id].next = next;
    blocks_[next].previous = id;
  }
  blocks_[0].references = 1;
}

std::size_t BlockPool::slot_of(BlockHash hash) const {
  std::size_t slot = hash & mask_;
  while (slots_[slot].first >= 0 && slots_[slot].hash != hash) slot = (slot + 1) & mask_;
  return slot;
}

void BlockPool::erase_slot(std::size_t slot) {
  std::size_t hole = slot;
  for (std::size_t next = (hole + 1) & mask_; slots_[next].first >= 0; next = (next + 1) & mask_) {
    // An entry may fill the hole unless that would put it before its own place.
    if (((next - slots_[next].hash) & mask_) >= ((next - hole) & mask_)) {
      slots_[hole] = slots_[next];
      hole = next;
    }
  }
  slots_[hole] = {};
}

BlockId BlockPool::find(BlockHash hash) const {
  return slots_[slot_of(hash)].first;
}

BlockPool::Held BlockPool::held() const {
  Held held;
  for (const Slot& slot : slots_) {
    if (slot.first >= 0) (slot.told_removed ? held.told_removed : held.told).push_back(slot.hash);
  }
  return held;
}

void BlockPool::unlink(BlockId id) {
  Block& block = blocks_[id];
  blocks_[block.previous].next = block.next;
  blocks_[block.next].previous = block.previous;
  --num_free_;
}

void BlockPool::link_after(BlockId position, BlockId id) {
  const BlockId next = blocks_[position].next;
  blocks_[id].previous = position;
  blocks_[id].next = next;
  blocks_[position].next = id;
  blocks_[next].previous = id;
  ++num_free_;
}

void BlockPool::evict(Block& block) {
  const std::size_t slot = slot_of(block.hash);
  if (block.previous_same >= 0) {
    blocks_[block.previous_same].next_same = block.next_same;
  } else {
    slots_[slot].first = block.next_same;
  }
  if (block.next_same >= 0) {
    blocks_[block.next_same].previous_same = block.previous_same;
  } else {
    slots_[slot].last = block.previous_same;
  }
  slots_[slot].told_removed = true;
  if (slots_[slot].first < 0) erase_slot(slot);
  block.previous_same = block.next_same = -1;
  block.cached = false;
  // Said even while another block still holds the prefix: so does vLLM.
  if (events_) events_->removed(block.hash);
}

void BlockPool::take(std::int32_t count, std::vector<BlockId>& out) {
  assert(count <= num_free_);
  for (; count > 0; --count) {
    const BlockId id = blocks_[queue_].next;
    unlink(id);
    Block& block = blocks_[id];
    if (block.cached) evict(block);
    block.references = 1;
    out.push_back(id);
  }
}

void BlockPool::touch(std::span<const BlockId> ids) {
  for (const BlockId id : ids) {
    if (blocks_[id].references++ == 0) unlink(id);
  }
}

void BlockPool::release_reversed(std::span<const BlockId> ids) {
  BlockId front = queue_;
  for (auto id = ids.rbegin(); id != ids.rend(); ++id) {
    Block& block = blocks_[*id];
    assert(block.references > 0);
    if (--block.references > 0) continue;
    if (block.cached) {
      link_after(blocks_[queue_].previous, *id);
    } else {
      link_after(front, *id);
      front = *id;
    }
  }
}

void BlockPool::cache(BlockId id, BlockHash hash) {
  Block& block = blocks_[id];
  assert(!block.cached && block.references > 0);
  block.hash = hash;
  block.cached = true;
  Slot& slot = slots_[slot_of(hash)];
  if (slot.first < 0) {
    slot = {hash, id, id};
    return;
  }
  slot.told_removed = false;
  block.previous_same = slot.last;
  blocks_[slot.last].next_same = id;
  slot.last = id;
}

bool BlockPool::reset() {
  if (num_free_ != num_blocks_ - 1) return false;
  for (Slot& slot : slots_) slot = {};
  for (Block& block : blocks_) {
    block.cached = false;
    block.previous_same = block.next_same = -1;
  }
  if (events_) events_->cleared();
  return true;
}

}  // namespace kvrouter::sim
