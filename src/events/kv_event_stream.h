// The event batches of one worker, in the order of their sequence numbers, live and replayed.
//
// A worker numbers its batches from 0.  What the stream does with a live number n after the last one, m:
//   n == m + 1   the batch is applied
//   n == 0, or n < m by a lot   the worker has restarted: its blocks are forgotten, then the batch is applied
//   n <= m       a duplicate: ignored
//   n > m + 1    a gap: batches m+1 to n-1 are lost
//
// Without replay, a gap means that what the worker holds is not known any more: the stream forgets the worker's blocks
// (a wrong belief is worse than none) and goes on from n.  The same after a lost connection or a batch that cannot be
// read.  What is learnt from then on is true but a part of the whole, until the worker says that its cache is cleared,
// or restarts.
//
// With replay, the stream is behind() after a gap, a lost connection, and at first.  Its owner then reads no live
// batches (they wait in the socket) but asks the worker to replay from begin_replay() on, which is the last batch that
// was applied: the answer begins with that very batch, byte for byte, or else the worker has lived another life
// meanwhile.  What is in the index is kept until that is known.  If the worker's buffer does not reach back so far, the
// blocks are forgotten and what the buffer has is applied, which makes a part of the whole.  The live batches that
// waited are duplicates then, up to where the replay ended.
//
// A reset by the user (on_reset) is a line that no replay crosses: batches up to it are never applied again.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvrouter/kv_event.h"

namespace kvrouter {

struct KvEventStreamCounts {
  std::uint64_t gaps = 0;            // times that batches were missing
  std::uint64_t missed_batches = 0;  // how many, in all gaps together, whether or not a replay brought them
  std::uint64_t duplicates = 0;
  std::uint64_t restarts = 0;
  std::uint64_t malformed = 0;
  std::uint64_t resyncs = 0;            // replays after which the stream was no longer behind
  std::uint64_t replayed_batches = 0;   // applied from replays
  std::uint64_t too_short_buffers = 0;  // replays that began later than asked for
  std::uint64_t resumed = 0;            // times that what was known from before was confirmed
};

// Where a stream is, and what it has learnt besides its blocks.
struct StreamPosition {
  std::uint64_t sequence = 0;          // of the batch that was applied last
  std::uint64_t digest = 0;            // of its bytes
  bool whole = false;                  // see KvEventStream::whole()
  std::uint64_t attention_groups = 0;  // see KvEventDecoder
};

enum class BatchOutcome { kApplied, kDuplicate, kGap, kRestarted, kMalformed };

// What the owner of a stream does next with the replay under way.
enum class ReplayStep {
  kGoOn,   // read on
  kAgain,  // ask anew from begin_replay()
  kDone,   // the stream is up to date
  kWrong,  // no publisher answers so: drop the connection, and ask again later
};

class KvEventStream {
 public:
  // Sequence numbers that fall back by at most this much are duplicates; by more, the sign of a restart.
  static constexpr std::uint64_t kDuplicateWindow = 10'000;  // what vLLM's replay buffer holds

  // REQUIRES: sink outlives the stream.
  KvEventStream(std::size_t block_size, KvEventSink& sink, bool replay = false);

  // A live batch.  kGap with replay: it was not applied, and the stream is behind.
  BatchOutcome on_batch(std::uint64_t sequence, std::span<const std::byte> payload);
  // The connection was lost, and with it an unknown number of batches.
  void on_disconnected();
  // Where the stream is, for resume() of another; nothing while it is behind, or can say nothing of its worker's life.
  std::optional<StreamPosition> position() const;
  // What was known at `position` in another process.  It is kept aside until a replay has shown that the worker is
  // still in that life, and dropped where anything speaks against it. REQUIRES: nothing was applied yet; the stream was
  // made for replay.
  void resume(const StreamPosition& position, std::vector<StoredChain> chains);
  struct Resumed {
    StreamPosition position;
    std::vector<StoredChain> chains;
  };
  // What was given to resume(), while that is neither confirmed nor dropped.
  const std::optional<Resumed>& resumed() const { return resumed_; }
  // The user has forgotten the worker's blocks: nothing published until now may count again.
  void on_reset();

  bool behind() const { return replay_ && behind_; }
  // A replay is about to be asked for: the number of the first batch wanted.
  std::uint64_t begin_replay();
  ReplayStep on_replayed(std::uint64_t sequence, std::span<const std::byte> payload);
  ReplayStep on_replay_end();
  // No replay is to be had: goes on with live batches as a stream without replay does.
  void give_up();
  // What is known is a part of the whole, and replays may be had (again): asks for everything.
  void start_over();
  // The connection has been lost for so long that the belief ends.
  void forget_unverified();

  const KvEventCounts& event_counts() const { return decoder_.counts(); }
  const KvEventStreamCounts& counts() const { return counts_; }
  std::optional<std::uint64_t> last_sequence() const { return last_ ? std::optional(last_->sequence) : std::nullopt; }
  // Whether the sink has been told all that the worker holds (or all since the last reset).
  bool whole() const { return whole_; }
  std::size_t mismatched_block_size() const { return decoder_.mismatched_block_size(); }
  const std::string& last_error() const { return last_error_; }

 private:
  // A batch that was applied, and a digest of its bytes, which differ between two lives of a worker (they hold the
  // time).
  struct Mark {
    std::uint64_t sequence;
    std::uint64_t digest;
  };

  bool apply(std::uint64_t sequence, std::span<const std::byte> payload);
  void believe_resumed();
  void restarted();
  void caught_up();
  void lose_track();

  KvEventDecoder decoder_;
  KvEventSink& sink_;
  const bool replay_;
  KvEventStreamCounts counts_;
  std::optional<Mark> last_;   // applied last
  std::optional<Mark> floor_;  // applied last before the user's last reset
  bool whole_ = false;
  bool behind_ = true;
  bool unverified_ = false;  // since a connection was lost: it may be another life of the worker
  // Live batches up to here are duplicates, 0 included, until one beyond it has come.
  std::optional<std::uint64_t> replayed_to_;
  std::uint64_t wanted_ = 0;  // the live batch that showed the last gap

  std::optional<Resumed> resumed_;  // not confirmed yet

  // Of the replay under way.
  std::optional<Mark> asked_from_;
  std::optional<std::uint64_t> answered_;  // the number of its last answer
  bool discard_ = false;                   // a reset came meanwhile
  std::uint64_t discarded_clears_ = 0;

  std::size_t other_block_size_ = 0;
  std::string last_error_;
};

}  // namespace kvrouter
