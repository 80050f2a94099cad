// Events at random, for property tests of the index.
//
// A small universe of prefixes, so that operations meet: a prefix is a path of a few locals out of `kLocals`.  An
// engine names a prefix by a hash of it; engines agree, or (hash seeds of their own) each has names of its own.
#pragma once

#include <rapidcheck.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kvrouter/prefix_index.h"

namespace kvrouter {

inline constexpr LocalHash kLocals = 2;
inline constexpr std::size_t kLongest = 9;
using Path = std::vector<LocalHash>;

struct Op {
  enum Kind { kStore, kRemove, kClear, kNothing } kind;
  WorkerId worker;
  Path path;
  std::size_t from;   // store: the blocks before it are taken for stored already; remove: the first that goes
  std::size_t count;  // remove: so many in a row, from the last on
};

inline rc::Gen<Op> gen_op(WorkerId num_workers) {
  return rc::gen::map(rc::gen::tuple(rc::gen::inRange(0, 100), rc::gen::inRange<WorkerId>(0, num_workers),
                                     rc::gen::container<Path>(rc::gen::inRange<LocalHash>(1, kLocals + 1)),
                                     rc::gen::inRange<std::size_t>(0, kLongest), rc::gen::inRange<std::size_t>(1, 4)),
                      [](const auto& t) {
                        auto [kind, worker, path, from, count] = t;
                        if (path.empty()) path.push_back(1);
                        if (path.size() > kLongest) path.resize(kLongest);
                        // Most stores are of whole prefixes, as most requests are.
                        const bool whole = kind < 30;
                        return Op{kind < 55   ? Op::kStore
                                  : kind < 95 ? Op::kRemove
                                  : kind < 98 ? Op::kClear
                                              : Op::kNothing,
                                  worker, path, whole ? 0 : from % path.size(), count};
                      });
}

template <typename Index>
void apply(Index& index, const Op& op, bool engines_agree) {
  const auto name = [&](std::size_t n) {
    EngineHash hash = 1469598103934665603ull + (engines_agree ? 0 : op.worker);
    for (std::size_t i = 0; i < n; ++i) hash = (hash ^ op.path[i]) * 1099511628211ull;
    return hash;
  };
  if (op.kind == Op::kStore) {
    std::vector<StoredBlock> blocks;
    for (std::size_t i = op.from; i < op.path.size(); ++i) blocks.push_back({op.path[i], name(i + 1)});
    std::optional<EngineHash> parent;
    if (op.from > 0) parent = name(op.from);
    index.store(op.worker, parent, blocks);
  } else if (op.kind == Op::kRemove) {
    std::vector<EngineHash> blocks;
    for (std::size_t i = std::min(op.from + op.count, op.path.size()); i > op.from; --i) blocks.push_back(name(i));
    index.remove(op.worker, blocks);
  } else if (op.kind == Op::kClear) {
    index.clear(op.worker);
  }
}

}  // namespace kvrouter
