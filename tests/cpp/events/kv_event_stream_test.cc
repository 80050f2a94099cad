#include "events/kv_event_stream.h"

#include <gtest/gtest.h>

#include "events/batch_builder.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::bytes_of;
using testing::removed_map;

BatchOutcome send(KvEventStream& stream, std::uint64_t sequence, EngineHash removed = 1) {
  return stream.on_batch(sequence, bytes_of(batch_of({removed_map({removed})})));
}

TEST(KvEventStream, InOrder_IsApplied) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  EXPECT_EQ(send(stream, 0), BatchOutcome::kApplied);
  EXPECT_EQ(send(stream, 1), BatchOutcome::kApplied);
  EXPECT_EQ(sink.removed.size(), 2u);
  EXPECT_EQ(sink.cleared, 0);
}

TEST(KvEventStream, LateStart_IsNoGap) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  EXPECT_EQ(send(stream, 500), BatchOutcome::kApplied);
  EXPECT_EQ(stream.counts().gaps, 0u);
}

TEST(KvEventStream, Gap_ForgetsWhatTheWorkerHeld) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 0);
  EXPECT_EQ(send(stream, 5), BatchOutcome::kGap);
  EXPECT_EQ(stream.counts().gaps, 1u);
  EXPECT_EQ(stream.counts().missed_batches, 4u);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(sink.removed.size(), 2u);  // the batch after the gap is applied
}

TEST(KvEventStream, GapThatWasReplayed_ForgetsNothing) {
  testing::RecordingSink sink;
  std::pair<std::uint64_t, std::uint64_t> asked;
  KvEventStream stream(64, sink, [&](std::uint64_t first, std::uint64_t next) {
    asked = {first, next};
    return true;
  });
  send(stream, 0);
  send(stream, 3);
  EXPECT_EQ(asked, (std::pair<std::uint64_t, std::uint64_t>{1, 3}));
  EXPECT_EQ(sink.cleared, 0);
}

TEST(KvEventStream, Duplicates_AreIgnored) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 3);
  send(stream, 4);
  EXPECT_EQ(send(stream, 4), BatchOutcome::kDuplicate);
  EXPECT_EQ(send(stream, 3), BatchOutcome::kDuplicate);
  EXPECT_EQ(sink.removed.size(), 2u);
}

TEST(KvEventStream, SequenceBackToZero_IsARestart) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 0);
  send(stream, 1);
  EXPECT_EQ(send(stream, 0), BatchOutcome::kRestarted);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(send(stream, 1), BatchOutcome::kApplied);
  EXPECT_EQ(stream.counts().restarts, 1u);
}

TEST(KvEventStream, FarBack_IsARestart) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 50'000);
  EXPECT_EQ(send(stream, 7), BatchOutcome::kRestarted);
}

TEST(KvEventStream, UnreadableBatch_ForgetsWhatTheWorkerHeld) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 0);
  EXPECT_EQ(stream.on_batch(1, bytes_of("garbage")), BatchOutcome::kMalformed);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_FALSE(stream.last_error().empty());
  EXPECT_EQ(send(stream, 2), BatchOutcome::kApplied);
}

TEST(KvEventStream, Disconnected_TakesAnyNumberNext) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink);
  send(stream, 10);
  stream.on_disconnected();
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(send(stream, 2), BatchOutcome::kApplied);
}

}  // namespace
}  // namespace kvrouter
