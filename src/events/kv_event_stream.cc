#include "events/kv_event_stream.h"

#include <utility>

namespace kvrouter {

KvEventStream::KvEventStream(std::size_t block_size, KvEventSink& sink, GapHandler on_gap)
    : decoder_(block_size), sink_(sink), on_gap_(std::move(on_gap)) {}

BatchOutcome KvEventStream::on_batch(std::uint64_t sequence, std::span<const std::byte> payload) {
  BatchOutcome outcome = BatchOutcome::kApplied;
  if (last_ && sequence <= *last_) {
    const bool restarted = (sequence == 0 && *last_ != 0) || *last_ - sequence > kDuplicateWindow;
    if (!restarted) {
      ++counts_.duplicates;
      return BatchOutcome::kDuplicate;
    }
    ++counts_.restarts;
    decoder_.reset();
    forget();
    outcome = BatchOutcome::kRestarted;
  } else if (last_ && sequence > *last_ + 1) {
    ++counts_.gaps;
    counts_.missed_batches += sequence - *last_ - 1;
    if (!on_gap_ || !on_gap_(*last_ + 1, sequence)) forget();
    outcome = BatchOutcome::kGap;
  }
  last_ = sequence;
  DecodeResult result = decoder_.decode(payload, sink_);
  if (!result.ok) {
    ++counts_.malformed;
    last_error_ = std::move(result.error);
    forget();
    return BatchOutcome::kMalformed;
  }
  return outcome;
}

void KvEventStream::on_disconnected() {
  last_.reset();
  decoder_.reset();
  forget();
}

void KvEventStream::forget() {
  sink_.on_interrupted();
}

}  // namespace kvrouter
