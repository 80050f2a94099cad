// Readers of an index beside its writer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <thread>
#include <vector>

#include "index/naive_index.h"
#include "index/random_ops.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {

using Overlap = std::vector<std::uint32_t>;

inline Overlap find(const PrefixIndex& index, std::span<const LocalHash> blocks) {
  Overlap overlap(index.num_workers(), 99);
  index.find_matches(blocks, overlap);
  return overlap;
}
inline Overlap find(const PrefixIndex& index, std::initializer_list<LocalHash> blocks) {
  return find(index, std::span(blocks.begin(), blocks.size()));
}

// Applies `ops` while two readers look for the paths of the first ones.  Whether all that they saw is allowed: called
// with what was seen of a worker, and what the worker held of that path at each moment while the reader looked.
// REQUIRES: ops is not empty.
template <typename Allowed>
bool readers_see_only(PrefixIndex& index, const std::vector<Op>& ops, bool engines_agree, Allowed allowed) {
  const std::size_t num_workers = index.num_workers();
  std::vector<Path> queries(std::min<std::size_t>(ops.size(), 6));
  for (std::size_t q = 0; q < queries.size(); ++q) queries[q] = ops[q].path;
  // held[q][w][n]: of query q, by worker w, after n operations.
  std::vector<std::vector<Overlap>> held(queries.size(), std::vector<Overlap>(num_workers, Overlap(1, 0)));
  NaiveIndex naive(static_cast<WorkerId>(num_workers));
  for (const Op& op : ops) {
    apply(naive, op, engines_agree);
    for (std::size_t q = 0; q < queries.size(); ++q) {
      const Overlap now = naive.find_matches(queries[q]);
      for (std::size_t w = 0; w < num_workers; ++w) held[q][w].push_back(now[w]);
    }
  }

  std::atomic<std::size_t> begun{0}, done{0};
  std::atomic<bool> wrong{false};
  const auto read = [&] {
    for (std::size_t round = 0; done < ops.size() && !wrong; ++round) {
      const std::size_t q = round % queries.size();
      const std::size_t first = done;
      const Overlap seen = find(index, queries[q]);
      const std::size_t last = begun;
      for (std::size_t w = 0; w < num_workers; ++w) {
        if (!allowed(seen[w], std::span(held[q][w]).subspan(first, last - first + 1))) wrong = true;
      }
    }
  };
  std::thread reader(read), another(read);
  for (const Op& op : ops) {
    ++begun;
    apply(index, op, engines_agree);
    ++done;
  }
  reader.join();
  another.join();
  return !wrong;
}

}  // namespace kvrouter
