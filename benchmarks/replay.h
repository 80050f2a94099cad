// Replays of an op stream on a PrefixIndex, and what they cost.
#pragma once

#include <cstddef>
#include <cstdint>

#include "measure.h"
#include "op_stream.h"

namespace kvrouter::bench {

struct ReplayFigures {
  double event_blocks_per_s = 0;
  double find_per_s = 0;
  double find_blocks_per_s = 0;
  std::uint64_t find_p50_ns = 0;
  std::uint64_t find_p99_ns = 0;
  std::uint64_t find_p999_ns = 0;
  std::uint64_t rss_bytes = 0;  // growth from before the index was made to after the last event
  std::uint64_t checksum = 0;
  std::uint64_t interleaved_checksum = 0;
  std::uint64_t interleaved_best = 0;  // blocks: the longest match of each find between events
  PrefixIndexStats stats;              // after the last event
};

// One thread.  Each event is timed by itself, and the finds between events are answered for the checksum but not
// timed; then all finds are asked again on the final index, twice, and the second round is timed find by find.
// memory_limit: the index's, bytes; 0: none.
ReplayFigures replay(const OpStream& stream, std::size_t memory_limit = 0);

struct ConcurrentFigures {
  std::size_t readers = 0;
  double event_blocks_per_s_under_read = 0;
  DurationHistogram quiet;        // finds of all readers, while nobody writes
  DurationHistogram under_write;  // the same finds, beside the writer
  double find_per_s_quiet = 0;    // of all readers together
  double find_per_s_under_write = 0;
  bool same_after = false;  // the index answers as before the writer came
};

// A writer beside `readers` readers, each on a core of its own where there are as many; readers ask the stream's finds
// round after round, and are measured by turns with and without the writer, for about `seconds` each.
//
// The writer takes the workers by turns: it removes what a worker holds at the end of the stream, the last blocks
// first, and stores and removes again all that the stream says of that worker.  So the index stays as full as the
// stream leaves it, and every event of the writer changes it.
// REQUIRES: readers > 0; the stream has a find and an event.
ConcurrentFigures replay_concurrently(const OpStream& stream, std::size_t readers, double seconds);

struct ChurnFigures {
  std::uint64_t rss_empty = 0;  // the index's own growth, as everywhere here
  std::uint64_t rss_full_first = 0;
  std::uint64_t rss_first = 0;  // after the first round: everything removed
  std::uint64_t rss_full_last = 0;
  std::uint64_t rss_last = 0;
  double event_blocks_per_s = 0;
  std::size_t pairs_left = 0;
};

// Inserts `pairs` (worker, block) pairs and removes them, `rounds` times; no prefix comes twice.  Rounds remove by
// turns: from the last block to the first, from the first to the last, and by clearing the workers.
// REQUIRES: pairs > 0, rounds > 0.
ChurnFigures churn(std::size_t pairs, std::size_t rounds);

}  // namespace kvrouter::bench
