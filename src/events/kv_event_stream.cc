#include "events/kv_event_stream.h"

#include <xxhash.h>

#include <utility>

namespace kvrouter {
namespace {

std::uint64_t digest_of(std::span<const std::byte> payload) {
  return XXH3_64bits(payload.data(), payload.size());
}

class CountingSink final : public KvEventSink {
 public:
  void on_stored(std::optional<EngineHash>, std::span<const StoredBlock>) override {}
  void on_removed(std::span<const EngineHash>) override {}
  void on_cleared() override { ++clears; }
  std::uint64_t clears = 0;
};

}  // namespace

KvEventStream::KvEventStream(std::size_t block_size, KvEventSink& sink, bool replay)
    : decoder_(block_size), sink_(sink), replay_(replay) {}

BatchOutcome KvEventStream::on_batch(std::uint64_t sequence, std::span<const std::byte> payload) {
  BatchOutcome outcome = BatchOutcome::kApplied;
  if (replayed_to_ && sequence <= *replayed_to_) {
    ++counts_.duplicates;
    return BatchOutcome::kDuplicate;
  }
  replayed_to_.reset();
  if (last_ && sequence <= last_->sequence) {
    const std::uint64_t last = last_->sequence;
    const bool another_life = (sequence == 0 && last != 0) || last - sequence > kDuplicateWindow;
    if (!another_life) {
      ++counts_.duplicates;
      return BatchOutcome::kDuplicate;
    }
    restarted();
    whole_ = sequence == 0;
    behind_ = sequence != 0;
    outcome = BatchOutcome::kRestarted;
    if (behind()) return outcome;
  } else if ((last_ && sequence > last_->sequence + 1) || (replay_ && !last_ && whole_ && sequence > 0)) {
    ++counts_.gaps;
    counts_.missed_batches += last_ ? sequence - last_->sequence - 1 : sequence;
    outcome = BatchOutcome::kGap;
    if (replay_) {
      behind_ = true;
      wanted_ = sequence;
      return outcome;
    }
    lose_track();
  } else if (!last_) {
    whole_ = sequence == 0;
  }
  return apply(sequence, payload) ? outcome : BatchOutcome::kMalformed;
}

bool KvEventStream::apply(std::uint64_t sequence, std::span<const std::byte> payload) {
  last_ = Mark{sequence, replay_ ? digest_of(payload) : 0};
  const std::uint64_t clears = decoder_.counts().cleared;
  DecodeResult result = decoder_.decode(payload, sink_);
  if (!result.ok) {
    ++counts_.malformed;
    last_error_ = std::move(result.error);
    lose_track();
    return false;
  }
  if (decoder_.counts().cleared != clears) whole_ = true;
  if (decoder_.mismatched_block_size() != other_block_size_) {
    // The worker was started anew with other blocks: whatever was stored before is no longer there.
    other_block_size_ = decoder_.mismatched_block_size();
    lose_track();
  }
  return true;
}

void KvEventStream::on_disconnected() {
  replayed_to_.reset();
  if (replay_) {
    behind_ = unverified_ = true;
    wanted_ = 0;
    return;
  }
  last_.reset();
  decoder_.reset();
  lose_track();
}

std::optional<StreamPosition> KvEventStream::position() const {
  if (!replay_ || behind_ || !last_) return std::nullopt;
  return StreamPosition{last_->sequence, last_->digest, whole_, decoder_.attention_groups()};
}

void KvEventStream::resume(const StreamPosition& position, std::vector<StoredChain> chains) {
  last_ = Mark{position.sequence, position.digest};
  unverified_ = true;
  resumed_ = Resumed{position, std::move(chains)};
}

void KvEventStream::believe_resumed() {
  decoder_.set_attention_groups(resumed_->position.attention_groups);
  for (const StoredChain& chain : resumed_->chains) sink_.on_stored(chain.parent, chain.blocks);
  whole_ = resumed_->position.whole;
  resumed_.reset();
  ++counts_.resumed;
}

void KvEventStream::on_reset() {
  resumed_.reset();
  floor_ = last_;
  if (behind_) discard_ = true;
}

std::uint64_t KvEventStream::begin_replay() {
  asked_from_ = last_;
  answered_.reset();
  return last_ ? last_->sequence : 0;
}

ReplayStep KvEventStream::on_replayed(std::uint64_t sequence, std::span<const std::byte> payload) {
  const std::uint64_t start = asked_from_ ? asked_from_->sequence : 0;
  if (!answered_) {
    if (sequence < start) return ReplayStep::kWrong;
    answered_ = sequence;
    if (asked_from_ && sequence == start) {
      if (digest_of(payload) != asked_from_->digest) {
        restarted();
        behind_ = true;
        return ReplayStep::kAgain;
      }
      unverified_ = false;
      if (resumed_) believe_resumed();
      return ReplayStep::kGoOn;  // it was applied in its time
    }
    if (sequence > start) {
      // The batch that would show whether it is the same life is gone, and so are those between.
      ++counts_.too_short_buffers;
      last_.reset();
      floor_.reset();
      decoder_.reset();
      lose_track();
      behind_ = true;
    } else {
      whole_ = true;  // from the first batch on
    }
    unverified_ = false;
  } else {
    if (sequence <= *answered_) return ReplayStep::kWrong;
    // A ROUTER socket drops what is over its high-water mark, which vLLM leaves at 1,000 messages.
    if (sequence != *answered_ + 1) return ReplayStep::kAgain;
    answered_ = sequence;
  }
  if (last_ && sequence <= last_->sequence) return ReplayStep::kGoOn;  // came live meanwhile
  if (discard_) {
    CountingSink clears;
    (void)KvEventDecoder(1).decode(payload, clears);
    discarded_clears_ += clears.clears;
    last_ = floor_ = Mark{sequence, digest_of(payload)};
    return ReplayStep::kGoOn;
  }
  ++counts_.replayed_batches;
  apply(sequence, payload);
  return ReplayStep::kGoOn;
}

ReplayStep KvEventStream::on_replay_end() {
  if (!answered_) {
    if (asked_from_) {  // it does not know a batch that it has published
      // Without a lost connection it is the same life, which keeps no batches.
      if (!unverified_) return ReplayStep::kWrong;
      restarted();
      behind_ = true;
      return ReplayStep::kAgain;
    }
    if (wanted_ > 0) return ReplayStep::kWrong;  // it has published, and keeps nothing
    whole_ = true;                               // nothing was published
  }
  if (behind_ && last_ && last_->sequence < wanted_) return ReplayStep::kAgain;  // a gap that opened meanwhile
  if (discard_) {
    whole_ = false;
    // Whether one of them is the clear that the reset awaits cannot be told: what comes from here on counts.
    if (discarded_clears_ > 0) sink_.on_interrupted();
  }
  if (behind_ && last_) {
    ++counts_.resyncs;
    replayed_to_ = last_->sequence;
  }
  caught_up();
  return ReplayStep::kDone;
}

void KvEventStream::give_up() {
  if (!behind_) return;
  last_.reset();
  decoder_.reset();
  lose_track();
  caught_up();
}

void KvEventStream::start_over() {
  if (behind_ || whole_) return;
  last_ = floor_;
  sink_.on_forgotten();
  behind_ = true;
}

void KvEventStream::forget_unverified() {
  if (!unverified_) return;
  unverified_ = false;
  whole_ = false;
  last_ = floor_;
  resumed_.reset();
  sink_.on_forgotten();
}

void KvEventStream::restarted() {
  ++counts_.restarts;
  last_.reset();
  floor_.reset();
  caught_up();
  decoder_.reset();
  lose_track();
}

void KvEventStream::caught_up() {
  behind_ = unverified_ = discard_ = false;
  discarded_clears_ = 0;
  wanted_ = 0;
}

void KvEventStream::lose_track() {
  whole_ = false;
  resumed_.reset();
  sink_.on_interrupted();
}

}  // namespace kvrouter
