// From engine hash to block: a hash table that stores block numbers only; the hashes themselves stand in the run store.
//
// The table is cut into many small ones (shards) by the hash, each of which grows on its own, in place: growth never
// stops the writer for long, copies nothing to other memory and leaves nothing behind.  A shard is a list of pages of
// groups; a group is one cache line: ten blocks, with 20 bits of the hash of each, 16 of which are compared at once.
// A name has a home group; if that is full it is in the next one that is not, and each full group on the way counts how
// many have passed.  The 16 bits also give the home, so a shard grows without looking at the names.  The hash is salted
// at random: nobody who chooses engine hashes can crowd a shard.  Writer only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "index/arena.h"
#include "index/fetch.h"
#include "index/run_store.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace kvrouter {

class NameTable {
  static constexpr unsigned kShardBits = 10;
  static constexpr std::uint32_t kBlockMask = (1u << RunStore::kBlockBits) - 1;
  struct Group;

 public:
  static constexpr BlockId kNone = ~BlockId{0};

  // Where a name belongs.  Looked up once for all that is done with the name.
  class Place {
    friend class NameTable;
    std::uint32_t shard() const { return static_cast<std::uint32_t>(hash_ >> (64 - kShardBits)); }
    std::uint32_t tag() const { return static_cast<std::uint32_t>(hash_ >> (64 - kShardBits - 16)) & 0xFFFF; }
    // Four more bits of the hash, above the bits of a block's number.
    std::uint32_t more() const { return static_cast<std::uint32_t>(hash_) & ~kBlockMask; }

    std::uint64_t hash_;
    Group* home_;           // nullptr: there is nothing in the shard
    std::uint32_t growth_;  // the home is this one until growth_ of the table changes
  };

  explicit NameTable(const RunStore& runs) : runs_(runs), shards_(std::make_unique<Shard[]>(kShards)) {
    std::random_device random;
    salt_ = std::uint64_t{random()} << 32 | random();
  }

  // Also fetches what is looked at first.
  void find_place(EngineHash name, Place& place) const {
    name = (name ^ salt_) * 0xD6E8FEB86659FD93ull;
    place.hash_ = (name ^ (name >> 32)) * 0x9E3779B97F4A7C15ull;
    locate(place);
    fetch(place.home_);
  }
  // To be called when that has come: fetches what else there is to look at.
  void fetch_rest(const Place& place) const {
    if (place.growth_ == growth_ && place.home_ && place.home_->count == kGroup) {
      const Shard& shard = shards_[place.shard()];
      fetch(&group(place.shard(), shard.next(shard.home(place.tag()))));
    }
  }

  BlockId find(EngineHash name) const {
    Place place;
    find_place(name, place);
    return find(place, name);
  }
  BlockId find(Place& place, EngineHash name) const {
    if (place.growth_ != growth_) locate(place);
    return place.home_ ? find_from(*place.home_, place, name) : kNone;
  }

  // Puts `name` in for `block`, unless it is there for another: then that one's number.  kNone: it was put in.
  // Throws std::bad_alloc; nothing is put in then.
  // REQUIRES: runs.engine(block) == name by the time of the next call.
  BlockId insert(Place& place, EngineHash name, BlockId block) {
    Shard& shard = shards_[place.shard()];
    if (shard.size >= shard.limit) grow(place.shard());
    if (place.growth_ != growth_) locate(place);
    Group& home = *place.home_;
    if (home.passed > 0 || home.matches(place.tag())) {
      const BlockId found = find_from(home, place, name);
      if (found != kNone) return found;
    }
    ++shard.size;
    if (home.count < kGroup) [[likely]] {
      home.add(place.tag(), place.more() | block);
    } else {
      put(place.shard(), shard.home(place.tag()), shard.num_groups, place.tag(), place.more() | block);
    }
    return kNone;
  }

  // Takes `name` out if it stands for `block`.
  void erase(EngineHash name, BlockId block) {
    Place place;
    find_place(name, place);
    erase(place, block);
  }
  void erase(Place& place, BlockId block) {
    if (place.growth_ != growth_) locate(place);
    if (!place.home_) return;
    Shard& shard = shards_[place.shard()];
    const std::uint32_t home = shard.home(place.tag());
    Group* here = place.home_;
    for (std::uint32_t g = home, steps = shard.num_groups;;) {
      for (unsigned candidates = here->matches(place.tag()); candidates; candidates &= candidates - 1) {
        const auto i = static_cast<unsigned>(__builtin_ctz(candidates));
        if (here->entry[i] != (place.more() | block)) continue;
        --here->count;
        here->tag[i] = here->tag[here->count];
        here->entry[i] = here->entry[here->count];
        for (std::uint32_t p = home; p != g; p = shard.next(p)) --group(place.shard(), p).passed;
        if (--shard.size == 0) give_back(place.shard());
        return;
      }
      if (here->passed == 0 || --steps == 0) return;
      g = shard.next(g);
      here = &group(place.shard(), g);
    }
  }

 private:
  static constexpr std::size_t kShards = std::size_t{1} << kShardBits;
  static constexpr std::uint32_t kGroup = 10;
  static constexpr std::uint32_t kPage = 16;  // groups

  struct alignas(64) Group {
    std::uint16_t tag[kGroup];
    std::uint16_t count;          // entries; the first of the arrays
    std::uint16_t passed;         // names that would be here or before, had there been room
    std::uint32_t entry[kGroup];  // a block's number and four more bits of the hash

    void add(std::uint32_t with_tag, std::uint32_t with_entry) {
      tag[count] = static_cast<std::uint16_t>(with_tag);
      entry[count] = with_entry;
      ++count;
    }
    // Bit i: entry i has this tag.
    unsigned matches(std::uint32_t wanted) const {
      unsigned found = 0;
#ifdef __SSE2__
      const __m128i all = _mm_set1_epi32(static_cast<int>(wanted * 0x10001));
      const __m128i low = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(tag)), all);
      const __m128i high = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(tag) + 1), all);
      found = static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
      for (unsigned i = 0; i < kGroup; ++i) found |= static_cast<unsigned>(tag[i] == wanted) << i;
#endif
      return found & ((1u << count) - 1);
    }
  };
  static_assert(sizeof(Group) == 64);

  struct Shard {
    std::uint32_t num_groups = 0;  // fills its pages
    std::uint32_t size = 0;
    std::uint32_t limit = 0;  // four fifths of the room: at this size it grows

    std::uint32_t home(std::uint32_t tag) const {
      return static_cast<std::uint32_t>((std::uint64_t{tag} * num_groups) >> 16);
    }
    std::uint32_t next(std::uint32_t g) const { return g + 1 == num_groups ? 0 : g + 1; }
  };

  // The n-th page of each shard, one shard after the other, then the n+1-th.
  std::uint32_t& page(std::uint32_t shard, std::uint32_t n) const { return pages_[n * kShards + shard]; }
  Group& group(std::uint32_t shard, std::uint32_t g) const {
    return groups_[std::size_t{page(shard, g / kPage)} * kPage + g % kPage];
  }
  void locate(Place& place) const {
    const Shard& shard = shards_[place.shard()];
    place.growth_ = growth_;
    place.home_ = shard.num_groups ? &group(place.shard(), shard.home(place.tag())) : nullptr;
  }

  BlockId find_from(const Group& home, const Place& place, EngineHash name) const {
    const Shard& shard = shards_[place.shard()];
    const Group* here = &home;
    for (std::uint32_t g = shard.home(place.tag()), steps = shard.num_groups;;) {
      for (unsigned candidates = here->matches(place.tag()); candidates; candidates &= candidates - 1) {
        const std::uint32_t entry = here->entry[__builtin_ctz(candidates)];
        if ((entry & ~kBlockMask) != place.more()) continue;
        const BlockId block = entry & kBlockMask;
        fetch(&runs_.node(block));  // what the caller wants next
        if (runs_.engine(block) == name) return block;
      }
      if (here->passed == 0 || --steps == 0) return kNone;
      g = shard.next(g);
      here = &group(place.shard(), g);
    }
  }

  // Puts an entry into the first group with room, from its home `g` on; false, and nothing done, if that is not among
  // the next `steps` groups.
  bool put(std::uint32_t shard, std::uint32_t g, std::uint32_t steps, std::uint32_t tag, std::uint32_t entry) {
    const std::uint32_t home = g;
    Group* here = &group(shard, g);
    while (here->count == kGroup) {
      if (--steps == 0) return false;
      g = shards_[shard].next(g);
      here = &group(shard, g);
    }
    for (std::uint32_t p = home; p != g; p = shards_[shard].next(p)) ++group(shard, p).passed;
    here->add(tag, entry);
    return true;
  }

  // Half as much room again.  Homes keep their order when the number of groups changes, and move away from the front:
  // so the groups are emptied from the last on, and their entries put where they belong now.  The few that belong into
  // groups that are still to be emptied wait.
  void grow(std::uint32_t number) {
    constexpr std::uint32_t kAhead = 8;
    Shard& shard = shards_[number];
    const std::uint32_t before = shard.num_groups;
    const std::uint32_t after = (before + std::max(before / 2, 1u) + kPage - 1) / kPage * kPage;
    pages_.grow(after / kPage * kShards);
    groups_.grow((std::size_t{num_pages_} + (after - before) / kPage) * kPage);
    for (std::uint32_t n = before / kPage; n < after / kPage; ++n) {
      if (free_pages_.empty()) {
        page(number, n) = num_pages_++;
      } else {
        page(number, n) = free_pages_.back();
        free_pages_.pop_back();
      }
    }
    shard.num_groups = after;
    shard.limit = after * kGroup * 4 / 5;
    ++growth_;
    waiting_.clear();
    const auto moved = [&](std::uint32_t g) { return static_cast<std::uint32_t>(std::uint64_t{g} * after / before); };
    for (std::uint32_t g = before; g-- > 0;) {
      if (g >= kAhead) {
        fetch(&group(number, g - kAhead));
        fetch(&group(number, moved(g - kAhead)));
      }
      empty(number, g, moved(g));
    }
    for (const Waiting& w : waiting_) put(number, shard.home(w.tag), after, w.tag, w.entry);
  }

  // The pages of an empty shard, which are as new, go to those that need some.
  void give_back(std::uint32_t number) {
    Shard& shard = shards_[number];
    for (std::uint32_t n = 0; n < shard.num_groups / kPage; ++n) free_pages_.push_back(page(number, n));
    shard = {};
    ++growth_;
  }

  // Moves the entries of group `g`, the first of which that are at home there belong into group `first` now.
  void empty(std::uint32_t number, std::uint32_t g, std::uint32_t first) {
    constexpr std::uint32_t kNear = 3;  // groups over which one that grows by half or to its double is spread
    const Shard& shard = shards_[number];
    const Group emptied = group(number, g);
    group(number, g).count = group(number, g).passed = 0;
    Group* near[kNear];
    for (std::uint32_t i = 0; i < kNear; ++i) near[i] = &group(number, std::min(first + i, shard.num_groups - 1));
    for (unsigned i = 0; i < emptied.count; ++i) {
      const std::uint32_t home = shard.home(emptied.tag[i]);
      if (home - first < kNear && home >= g && near[home - first]->count < kGroup) [[likely]] {
        near[home - first]->add(emptied.tag[i], emptied.entry[i]);
      } else if (home < g || !put(number, home, shard.num_groups - home, emptied.tag[i], emptied.entry[i])) {
        waiting_.push_back({emptied.tag[i], emptied.entry[i]});
      }
    }
  }

  struct Waiting {
    std::uint32_t tag;
    std::uint32_t entry;
  };
  static constexpr std::size_t kMaxGroups = std::size_t{1} << (RunStore::kBlockBits - 2);

  const RunStore& runs_;
  Arena<Group> groups_{kMaxGroups};
  Arena<std::uint32_t> pages_{kMaxGroups / kPage};
  std::uint32_t num_pages_ = 0;
  std::vector<std::uint32_t> free_pages_;
  std::unique_ptr<Shard[]> shards_;
  std::uint64_t salt_ = 0;
  std::uint32_t growth_ = 0;      // how many times a shard has grown, or become empty
  std::vector<Waiting> waiting_;  // working memory of grow()
};

// The places of a sequence of names, in order.  Looks ahead, so that what is at a place is in the cache by its turn.
template <typename NameAt>  // std::size_t -> EngineHash
class PlacesAhead {
 public:
  PlacesAhead(const NameTable& table, std::size_t size, NameAt name_at)
      : table_(table), size_(size), name_at_(name_at) {
    for (std::size_t i = 0; i < std::min(kAhead, size); ++i) table_.find_place(name_at_(i), ring_[i]);
  }

  // It is good until the next call.
  // REQUIRES: it has been called fewer times than there are names.
  NameTable::Place& next() {
    const std::size_t i = at_++;
    if (i + kAhead < size_) table_.find_place(name_at_(i + kAhead), ring_[(i + kAhead) % kRing]);
    if (i + kAhead / 2 < size_) table_.fetch_rest(ring_[(i + kAhead / 2) % kRing]);
    return ring_[i % kRing];
  }

 private:
  static constexpr std::size_t kRing = 32;
  static constexpr std::size_t kAhead = kRing - 1;

  const NameTable& table_;
  const std::size_t size_;
  const NameAt name_at_;
  std::size_t at_ = 0;
  NameTable::Place ring_[kRing];
};

}  // namespace kvrouter
