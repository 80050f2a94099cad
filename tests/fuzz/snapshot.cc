// A snapshot, as a file or a peer has it, into an index.
#include "replica/snapshot.h"

#include <xxhash.h>

#include <string>

#include "fuzz.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter::fuzz {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// A fuzzer does not find checksums.
std::string wrapped(std::string_view body) {
  std::string bytes = encode(Snapshot{1, {}}).substr(0, 12);
  const std::uint64_t numbers[] = {body.size(), XXH3_64bits(body.data(), body.size())};
  bytes.append(reinterpret_cast<const char*>(numbers), sizeof numbers);
  return bytes.append(body);
}

void check(const Snapshot& snapshot) {
  FUZZ_CHECK(snapshot.block_size > 0);
  PrefixIndex index(1);
  for (const WorkerSnapshot& worker : snapshot.workers) {
    std::size_t blocks = 0;
    for (const StoredChain& chain : worker.chains) {
      FUZZ_CHECK(!chain.blocks.empty());
      blocks += chain.blocks.size();
      index.store(0, chain.parent, chain.blocks);
    }
    FUZZ_CHECK(index.held_blocks(0) <= blocks);
    index.clear(0);
  }
  Snapshot again;
  FUZZ_CHECK(decode(bytes_of(encode(snapshot)), again).empty());
  FUZZ_CHECK(again.workers.size() == snapshot.workers.size());
}

}  // namespace

void fuzz_one(std::string_view input) {
  Snapshot snapshot;
  if (decode(bytes_of(input), snapshot).empty()) check(snapshot);
  if (decode(bytes_of(wrapped(input)), snapshot).empty()) check(snapshot);
}

}  // namespace kvrouter::fuzz
