// What a router knows of its workers' caches, in a file or on its way to a replica that joins.
//
//   8 bytes "KVRSNAP\n", version (u32), size of the rest (u64), XXH3 of the rest (u64), all little endian;
//   then MessagePack:  [block size, [[identity, sequence, digest, whole, groups, [[parent or nil, blocks], ...]], ...]]
//
// with blocks as pairs of local and engine hash, eight bytes each, little endian.  A worker's part says what its index
// was after the batch of that sequence number, of which it has the digest: whoever reads it believes it only once the
// worker has shown the same batch, and replays what it has published since (KvEventStream::resume).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "events/kv_event_stream.h"

namespace kvrouter {

struct WorkerSnapshot {
  std::string identity;  // see identity_of()
  StreamPosition position;
  std::vector<StoredChain> chains;
};

struct Snapshot {
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 30;
  static constexpr std::size_t kMaxWorkers = 1 << 16;

  std::uint64_t block_size = 0;
  std::vector<WorkerSnapshot> workers;
};

std::string encode(const Snapshot& snapshot);
// Empty on success, else what is wrong; then nothing of `out` is to be used.
std::string decode(std::span<const std::byte> bytes, Snapshot& out);

// The file is complete and on the disk when this returns, or as it was before.  Throws std::system_error.
void write_file_atomically(const std::string& path, std::string_view bytes);

}  // namespace kvrouter
