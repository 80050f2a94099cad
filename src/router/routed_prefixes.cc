#include "router/routed_prefixes.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace kvrouter {
namespace {

constexpr std::size_t kMinSlots = 64;
constexpr std::size_t kMaxRows = 2 + 64;  // the two ends, and one for each halving

}  // namespace

void RoutedPrefixes::reset(std::size_t num_workers) {
  const std::size_t words = (num_workers + 63) / 64;
  for (Generation* generation : {&current_, &previous_}) {
    if (words != words_ || generation->slots.empty()) {
      generation->slots.assign(kMinSlots, {0, 0});
      generation->sets.assign(kMinSlots * words, 0);
    }
    generation->size = 0;
    ++generation->epoch;
  }
  words_ = words;
  scratch_.resize(kMaxRows * words_);
}

void RoutedPrefixes::next_generation() {
  std::swap(current_, previous_);
  current_.size = 0;
  ++current_.epoch;
}

std::size_t RoutedPrefixes::slot_of(const Generation& generation, PrefixHash key) const {
  const std::size_t mask = generation.slots.size() - 1;
  std::size_t slot = static_cast<std::size_t>(key) & mask;  // prefix hashes are well mixed
  while (generation.slots[slot].epoch == generation.epoch && generation.slots[slot].key != key) {
    slot = (slot + 1) & mask;
  }
  return slot;
}

void RoutedPrefixes::grow(Generation& generation) {
  Generation larger;
  larger.slots.assign(generation.slots.size() * 2, {0, 0});
  larger.sets.assign(generation.sets.size() * 2, 0);
  larger.size = generation.size;
  for (std::size_t i = 0; i < generation.slots.size(); ++i) {
    if (generation.slots[i].epoch != generation.epoch) continue;
    const std::size_t slot = slot_of(larger, generation.slots[i].key);
    larger.slots[slot] = {generation.slots[i].key, larger.epoch};
    std::copy_n(&generation.sets[i * words_], words_, &larger.sets[slot * words_]);
  }
  generation = std::move(larger);
}

bool RoutedPrefixes::contains(const Generation& generation, PrefixHash key, WorkerId worker) const {
  const std::size_t slot = slot_of(generation, key);
  return generation.slots[slot].epoch == generation.epoch &&
         (generation.sets[slot * words_ + worker / 64] >> (worker % 64) & 1) != 0;
}

template <typename Kept>
void RoutedPrefixes::add_all(std::size_t count, Kept kept, WorkerId worker) {
  // Before anything is added: a generation has all of a request's prefixes, or none.
  if (current_.size > 0 && 2 * (current_.size + count + 1) > kMaxSlots) {
    next_generation();
    ++ended_early_;
  }
  // From the longest: where a prefix is known, the shorter ones are.  A sibling costs one probe.
  for (std::size_t i = count; i-- > 0;) {
    const PrefixHash prefix = kept(i);
    if (contains(current_, prefix, worker)) return;
    if (2 * (current_.size + 1) > current_.slots.size()) grow(current_);
    const std::size_t slot = slot_of(current_, prefix);
    std::uint64_t* set = &current_.sets[slot * words_];
    if (current_.slots[slot].epoch != current_.epoch) {
      current_.slots[slot] = {prefix, current_.epoch};
      std::fill_n(set, words_, 0);
      ++current_.size;
    }
    set[worker / 64] |= std::uint64_t{1} << (worker % 64);
  }
}

void RoutedPrefixes::add(std::span<const PrefixHash> prefixes, WorkerId worker) {
  add_all(num_kept(prefixes.size()), [&](std::size_t i) { return prefixes[kept_depth(i) - 1]; }, worker);
}

void RoutedPrefixes::add_kept(std::span<const PrefixHash> kept, WorkerId worker) {
  add_all(kept.size(), [&](std::size_t i) { return kept[i]; }, worker);
}

std::size_t RoutedPrefixes::append_kept(std::span<const PrefixHash> prefixes, std::size_t most,
                                        std::vector<PrefixHash>& out) {
  const std::size_t count = std::min(num_kept(prefixes.size()), most);
  for (std::size_t i = 0; i < count; ++i) out.push_back(prefixes[kept_depth(i) - 1]);
  return count;
}

void RoutedPrefixes::read(PrefixHash key, std::size_t index) {
  std::uint64_t* out = row(index);
  std::fill_n(out, words_, 0);
  for (const Generation* generation : {&current_, &previous_}) {
    if (generation->size == 0) continue;
    const std::size_t slot = slot_of(*generation, key);
    if (generation->slots[slot].epoch != generation->epoch) continue;
    for (std::size_t i = 0; i < words_; ++i) out[i] |= generation->sets[slot * words_ + i];
  }
}

void RoutedPrefixes::raise(std::span<const PrefixHash> prefixes, std::span<std::uint32_t> depth) {
  if (prefixes.empty() || current_.size + previous_.size == 0) return;
  read(prefixes.front(), 0);
  if (std::all_of(row(0), row(0) + words_, [](std::uint64_t word) { return word == 0; })) return;
  const std::size_t last = num_kept(prefixes.size()) - 1;
  read(prefixes[kept_depth(last) - 1], 1);
  for (std::size_t i = 0; i < words_; ++i) {
    for (std::uint64_t rest = row(1)[i]; rest != 0; rest &= rest - 1) {
      const std::size_t worker = 64 * i + static_cast<std::size_t>(std::countr_zero(rest));
      depth[worker] = std::max(depth[worker], static_cast<std::uint32_t>(kept_depth(last)));
    }
  }
  bisect(prefixes, 0, 0, last, 1, depth);
}

void RoutedPrefixes::bisect(std::span<const PrefixHash> prefixes, std::size_t low, std::size_t low_row,
                            std::size_t high, std::size_t high_row, std::span<std::uint32_t> depth) {
  if (std::equal(row(low_row), row(low_row) + words_, row(high_row))) return;
  if (high - low <= 1) {
    for (std::size_t i = 0; i < words_; ++i) {
      for (std::uint64_t gone = row(low_row)[i] & ~row(high_row)[i]; gone != 0; gone &= gone - 1) {
        const std::size_t worker = 64 * i + static_cast<std::size_t>(std::countr_zero(gone));
        depth[worker] = std::max(depth[worker], static_cast<std::uint32_t>(kept_depth(low)));
      }
    }
    return;
  }
  const std::size_t middle = low + (high - low) / 2;
  const std::size_t middle_row = std::max(low_row, high_row) + 1;
  read(prefixes[kept_depth(middle) - 1], middle_row);
  bisect(prefixes, low, low_row, middle, middle_row, depth);
  bisect(prefixes, middle, middle_row, high, high_row, depth);
}

}  // namespace kvrouter
