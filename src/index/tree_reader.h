// Look-ups in the tree, beside its writer.
#pragma once

#include <cstdint>
#include <span>

#include "index/tree.h"

namespace kvrouter {

// Fills `overlap` with the number of leading blocks that each worker holds.  Takes no lock; walks again when the writer
// has changed what was walked (node.h).  REQUIRES: overlap.size() == tree.num_workers().
void find_matches(const Tree& tree, std::span<const LocalHash> blocks, std::span<std::uint32_t> overlap);

}  // namespace kvrouter
