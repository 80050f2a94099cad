// The event batches of one worker, in the order of their sequence numbers.
//
// A worker numbers its batches from 0.  What the stream does with a number n after the last one, m:
//   n == m + 1   the batch is applied
//   n == 0, or n < m by a lot   the worker has restarted: its blocks are forgotten, then the batch is applied
//   n <= m       a duplicate: ignored
//   n > m + 1    a gap: batches m+1 to n-1 are lost
// The first batch seen may have any number: batches before it were published before the router listened.
//
// After a gap, or a batch that could not be read, what the worker holds is not known any more.  The stream then
// forgets the worker's blocks (a wrong belief is worse than none) and goes on from there.  `on_gap` is where a replay
// of the lost batches hooks in: if it returns true it has applied them itself, and nothing is forgotten.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "kvrouter/kv_event.h"

namespace kvrouter {

struct KvEventStreamCounts {
  std::uint64_t gaps = 0;            // times that batches were missing
  std::uint64_t missed_batches = 0;  // how many, in all gaps together
  std::uint64_t duplicates = 0;
  std::uint64_t restarts = 0;
  std::uint64_t malformed = 0;
};

enum class BatchOutcome { kApplied, kDuplicate, kGap, kRestarted, kMalformed };

class KvEventStream {
 public:
  // Sequence numbers that fall back by at most this much are duplicates; by more, the sign of a restart.
  static constexpr std::uint64_t kDuplicateWindow = 10'000;  // what vLLM's replay buffer holds

  using GapHandler = std::function<bool(std::uint64_t first_missing, std::uint64_t next_seen)>;

  // REQUIRES: sink outlives the stream.
  KvEventStream(std::size_t block_size, KvEventSink& sink, GapHandler on_gap = nullptr);

  BatchOutcome on_batch(std::uint64_t sequence, std::span<const std::byte> payload);
  // The connection was lost, and with it an unknown number of batches: forgets the worker's blocks, and takes
  // whatever comes next as a first batch.
  void on_disconnected();

  const KvEventCounts& event_counts() const { return decoder_.counts(); }
  const KvEventStreamCounts& counts() const { return counts_; }
  std::optional<std::uint64_t> last_sequence() const { return last_; }
  std::size_t mismatched_block_size() const { return decoder_.mismatched_block_size(); }
  const std::string& last_error() const { return last_error_; }

 private:
  void forget();

  KvEventDecoder decoder_;
  KvEventSink& sink_;
  GapHandler on_gap_;
  KvEventStreamCounts counts_;
  std::optional<std::uint64_t> last_;
  std::string last_error_;
};

}  // namespace kvrouter
