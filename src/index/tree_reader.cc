#include "index/tree_reader.h"

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "index/fetch.h"

namespace kvrouter {
namespace {

constexpr auto kAcquire = std::memory_order_acquire;

// The nodes of a walk, with the versions that they had.
class Visits {
 public:
  void clear() { size_ = 0; }
  void add(const Node* node, std::uint32_t version) {
    if (size_ < kInline) [[likely]] {
      inline_[size_++] = {node, version};
    } else {
      add_more({node, version});
    }
  }
  bool unchanged() const {
    for (std::size_t i = 0; i < size_; ++i) {
      const Visit& visit = i < kInline ? inline_[i] : more()[i - kInline];
      if (visit.node->version.load(kAcquire) != visit.version) return false;
    }
    return true;
  }

 private:
  struct Visit {
    const Node* node;
    std::uint32_t version;
  };
  static constexpr std::size_t kInline = 16;
  [[gnu::noinline]] void add_more(Visit visit) {
    more().resize(size_++ - kInline);
    more().push_back(visit);
  }
  static std::vector<Visit>& more() {
    thread_local std::vector<Visit> visits;
    return visits;
  }

  std::size_t size_ = 0;
  Visit inline_[kInline];
};

void record(std::uint64_t workers, std::size_t word, std::uint32_t depth, std::span<std::uint32_t> overlap) {
  for (; workers; workers &= workers - 1) {
    overlap[word * 64 + static_cast<std::size_t>(std::countr_zero(workers))] = depth;
  }
}

constexpr std::size_t kLine = 8;  // blocks in a cache line

bool line_matches(const std::atomic<LocalHash>* run, const LocalHash* blocks) {
  std::uint64_t difference = 0;
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kLine; ++i) difference |= run[i].load(std::memory_order_relaxed) ^ blocks[i];
  return difference == 0;
}

// How many of the blocks are the run's first.
std::size_t matching(const std::atomic<LocalHash>* run, std::span<const LocalHash> blocks) {
  // Both are in order, but the processor's own fetching ahead starts slowly, and anew in each page of 4 KB.
  constexpr std::size_t kAhead = 32 * kLine;
  const std::size_t size = blocks.size();
  std::size_t n = 0;
  for (; n + kLine <= size; n += kLine) {
    fetch(blocks.data() + n + kAhead);
    fetch(run + n + kAhead);
    if (!line_matches(run + n, blocks.data() + n)) break;
  }
  // What is left over is looked at as a line too, together with blocks that are known to match.
  if (n > 0 && n + kLine > size && line_matches(run + size - kLine, blocks.data() + size - kLine)) n = size;
  while (n < size && run[n].load(std::memory_order_relaxed) == blocks[n]) ++n;
  std::atomic_thread_fence(std::memory_order_acquire);
  return n;
}

// One walk from the root.  kWords: words of a set of workers; 0: as many as the layout says.
template <std::size_t kWords>
class Walk {
 public:
  Walk(const Tree& tree, std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap)
      : tree_(tree), blocks_(blocks), overlap_(overlap), words_(kWords ? kWords : tree.layout().words) {
    if constexpr (kWords == 0) alive_.resize(words_), full_.resize(words_);
  }

  // False if the writer has come in between, and the result is to be thrown away.
  bool run() {
    std::fill(overlap_.begin(), overlap_.end(), 0);
    visits_.clear();
    std::fill(alive_.begin(), alive_.end(), ~std::uint64_t{0});
    depth_ = 0;
    const std::uint32_t generation = tree_.edges().generation();
    const std::uint32_t now = tree_.now();
    SpaceId space = kRootSpace;
    std::uint64_t place = blocks_.empty() ? 0 : tree_.edges().place(space, blocks_[0]);
    bool goes_on = true;
    while (goes_on && depth_ < blocks_.size()) {
      const Edge edge = tree_.edges().find(place, space, blocks_[depth_]);
      if (!edge) break;
      const Node* node = tree_.node(edge.node);
      const std::uint32_t version = node->version.load(kAcquire);
      if (version % 2 != 0) return false;
      if (node->parent.load(kAcquire) != space) return false;
      visits_.add(node, version);
      if (node->used.load(std::memory_order_relaxed) != now) node->used.store(now, std::memory_order_relaxed);
      const std::size_t length = node->length.load(kAcquire);
      // Not the edge's, which may be of another node that had this number before.
      const std::atomic<LocalHash>* run = tree_.run(node->start.load(kAcquire));
      space = node->children.load(kAcquire);
      if (depth_ + length < blocks_.size()) place = tree_.edges().place(space, blocks_[depth_ + length]);
      const std::size_t matched = matching(run, blocks_.subspan(depth_, std::min(length, blocks_.size() - depth_)));
      goes_on = pass(*node, static_cast<std::uint32_t>(matched), matched == length);
    }
    if (goes_on && depth_ > 0) {
      for (std::size_t i = 0; i < words_; ++i) record(alive_[i], i, depth_, overlap_);
    }
    return visits_.unchanged() && tree_.edges().generation() == generation;
  }

 private:
  // Takes the walk over `matched` blocks of the node (`whole`: all of them).  Records the overlap of the workers that
  // hold less; whether any is left.
  bool pass(const Node& node, std::uint32_t matched, bool whole) {
    // The bits of those who hold all before the entries of those who hold a part: see node.h.
    for (std::size_t i = 0; i < words_; ++i) full_[i] = node.full()[i].load(kAcquire);
    std::uint64_t staying = 0, leaving = 0;
    for (std::size_t i = 0; i < words_; ++i) {
      const std::uint64_t stay = alive_[i] & full_[i], leave = alive_[i] & ~full_[i];
      if (depth_ > 0) record(leave, i, depth_, overlap_);
      if (!whole) record(stay, i, depth_ + matched, overlap_);
      staying |= stay;
      leaving |= leave;
    }
    if (leaving) record_partial(node, matched);
    for (std::size_t i = 0; i < words_; ++i) alive_[i] &= full_[i];
    depth_ += matched;
    return whole && staying;
  }

  void record_partial(const Node& node, std::uint32_t matched) {
    const std::atomic<std::uint64_t>* partial = tree_.layout().partial(&node);
    for (std::size_t i = 0; i < tree_.layout().partials; ++i) {
      const std::uint64_t entry = partial[i].load(kAcquire);
      if (entry == 0) continue;
      const WorkerId worker = Partial::worker(entry);
      const std::uint64_t bit = std::uint64_t{1} << (worker % 64);
      if (worker < overlap_.size() && (alive_[worker / 64] & ~full_[worker / 64] & bit)) {
        overlap_[worker] = depth_ + std::min(Partial::depth(entry), matched);
      }
    }
  }

  const Tree& tree_;
  std::span<const LocalHash> blocks_;
  std::span<std::uint32_t> overlap_;
  std::size_t words_;
  std::uint32_t depth_ = 0;
  using Words = std::conditional_t<kWords == 0, std::vector<std::uint64_t>, std::array<std::uint64_t, kWords>>;
  Words alive_;  // workers that hold everything so far
  Words full_;
  Visits visits_;
};

template <std::size_t kWords>
void walk(const Tree& tree, std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) {
  Walk<kWords> walk(tree, blocks, overlap);
  while (!walk.run()) {
  }
}

}  // namespace

void find_matches(const Tree& tree, std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap) {
  switch (tree.layout().words) {
    case 1:
      return walk<1>(tree, blocks, overlap);
    case 2:
      return walk<2>(tree, blocks, overlap);
    case 4:
      return walk<4>(tree, blocks, overlap);
    case 8:
      return walk<8>(tree, blocks, overlap);
    default:
      return walk<0>(tree, blocks, overlap);
  }
}

}  // namespace kvrouter
