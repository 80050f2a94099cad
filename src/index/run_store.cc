// Invariant: a free extent is maximal within its chunk, is in exactly one bin's list, and has its length at both ends;
// every unit outside of free extents has at least one user.
#include "index/run_store.h"

#include <algorithm>
#include <bit>
#include <cassert>

namespace kvrouter {

void RunStore::add_chunk() {
  const std::uint32_t first = num_units_;
  const std::uint32_t units = first + kChunkUnits;
  if (units > kMaxUnits) throw std::bad_alloc();
  // A reader that takes a run's begin and another's length (node.h) still reads mapped memory.
  local_.grow(std::size_t{units} * kUnit + kMaxRun);
  engine_.grow(std::size_t{units} * kUnit);
  node_.grow(std::size_t{units} * kUnit);
  users_.grow(units);
  extent_.grow(units);
  num_units_ = units;
  insert_free(first, kChunkUnits);
}

std::uint32_t RunStore::bin_of(std::uint32_t units) {
  if (units <= kExactBins) return units - 1;
  return kExactBins + static_cast<std::uint32_t>(std::bit_width(units)) - 7;  // 65 to 127: the first of them
}

void RunStore::insert_free(std::uint32_t unit, std::uint32_t units) {
  extent_[unit] = extent_[unit + units - 1] = static_cast<std::uint16_t>(units);
  const std::uint32_t bin = bin_of(units);
  const std::uint32_t head = bins_[bin];
  previous(unit) = kNone;
  next(unit) = head;
  if (head != kNone) previous(head) = unit;
  bins_[bin] = unit;
  filled_[bin / 64] |= std::uint64_t{1} << (bin % 64);
}

void RunStore::remove_free(std::uint32_t unit) {
  const std::uint32_t bin = bin_of(extent_[unit]);
  const std::uint32_t before = previous(unit);
  const std::uint32_t behind = next(unit);
  if (before != kNone) {
    next(before) = behind;
  } else {
    bins_[bin] = behind;
    if (behind == kNone) filled_[bin / 64] &= ~(std::uint64_t{1} << (bin % 64));
  }
  if (behind != kNone) previous(behind) = before;
}

void RunStore::give_back(std::uint32_t unit, std::uint32_t units) {
  used_units_ -= units;
  const std::uint32_t begin_of_chunk = unit / kChunkUnits * kChunkUnits;
  const std::uint32_t end_of_chunk = begin_of_chunk + kChunkUnits;
  if (unit > begin_of_chunk && users_[unit - 1] == 0) {
    const std::uint32_t before = extent_[unit - 1];
    remove_free(unit - before);
    unit -= before;
    units += before;
  }
  if (unit + units < end_of_chunk && users_[unit + units] == 0) {
    const std::uint32_t behind = extent_[unit + units];
    remove_free(unit + units);
    units += behind;
  }
  insert_free(unit, units);
}

// The first `units` of a free extent become used; the rest stays free.
void RunStore::take(std::uint32_t unit, std::uint32_t extent_units, std::uint32_t units) {
  remove_free(unit);
  used_units_ += units;
  std::fill_n(&users_[unit], units, std::uint8_t{1});
  if (extent_units > units) insert_free(unit + units, extent_units - units);
}

std::uint32_t RunStore::find_free(std::uint32_t units) {
  std::uint32_t bin = bin_of(units);
  if (bin >= kExactBins) {  // a logarithmic bin: its extents may be too short
    for (std::uint32_t unit = bins_[bin]; unit != kNone; unit = next(unit)) {
      if (extent_[unit] >= units) return unit;
    }
    ++bin;
  }
  for (std::uint32_t word = bin / 64; word < filled_.size(); ++word) {
    std::uint64_t bits = filled_[word];
    if (word == bin / 64) bits &= ~std::uint64_t{0} << (bin % 64);
    if (bits) return bins_[word * 64 + static_cast<std::uint32_t>(std::countr_zero(bits))];
  }
  return kNone;
}

BlockId RunStore::allocate(std::uint32_t blocks) {
  assert(blocks > 0 && blocks <= kMaxRun);
  const std::uint32_t units = round_up(blocks) / kUnit;
  std::uint32_t unit = find_free(units);
  if (unit == kNone) {
    add_chunk();
    unit = find_free(units);
  }
  take(unit, extent_[unit], units);
  return unit * kUnit;
}

std::uint32_t RunStore::extend(BlockId end, std::uint32_t blocks) {
  const std::uint32_t unit = end / kUnit;
  if (end % kUnit != 0 || unit % kChunkUnits == 0 || users_[unit] != 0) return 0;
  const std::uint32_t units = std::min<std::uint32_t>(round_up(blocks) / kUnit, extent_[unit]);
  take(unit, extent_[unit], units);
  return units * kUnit;
}

void RunStore::split(BlockId at) {
  if (at % kUnit != 0) ++users_[at / kUnit];
}

void RunStore::release(BlockId begin, BlockId end) {
  std::uint32_t first_free = kNone;
  const std::uint32_t last = (end + kUnit - 1) / kUnit;
  for (std::uint32_t unit = begin / kUnit; unit < last; ++unit) {
    if (--users_[unit] == 0) {
      if (first_free == kNone) first_free = unit;
    } else if (first_free != kNone) {
      give_back(first_free, unit - first_free);
      first_free = kNone;
    }
  }
  if (first_free != kNone) give_back(first_free, last - first_free);
}

}  // namespace kvrouter
