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

// The batch that a worker would have sent under this number.
std::string batch_number(std::uint64_t sequence) {
  return batch_of({removed_map({sequence})});
}
ReplayStep replay(KvEventStream& stream, std::uint64_t sequence) {
  return stream.on_replayed(sequence, bytes_of(batch_number(sequence)));
}
BatchOutcome live(KvEventStream& stream, std::uint64_t sequence) {
  return stream.on_batch(sequence, bytes_of(batch_number(sequence)));
}
void replay_all(KvEventStream& stream, std::uint64_t first, std::uint64_t last) {
  ASSERT_EQ(stream.begin_replay(), first);
  for (std::uint64_t n = first; n <= last; ++n) ASSERT_EQ(replay(stream, n), ReplayStep::kGoOn);
  ASSERT_EQ(stream.on_replay_end(), ReplayStep::kDone);
}

TEST(KvEventStreamWithReplay, LateStart_TakesAllFromTheReplayAndThenGoesOnLive) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  EXPECT_TRUE(stream.behind());
  replay_all(stream, 0, 9);
  EXPECT_FALSE(stream.behind());
  EXPECT_TRUE(stream.whole());
  for (std::uint64_t n = 0; n < 10; ++n) EXPECT_EQ(live(stream, n), BatchOutcome::kDuplicate);  // they waited
  EXPECT_EQ(live(stream, 10), BatchOutcome::kApplied);
  EXPECT_EQ(sink.removed.size(), 11u);
  EXPECT_EQ(stream.counts().resyncs, 1u);
}

TEST(KvEventStreamWithReplay, Gap_KeepsWhatIsKnownAndAppliesWhatWasMissed) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 2);
  EXPECT_EQ(live(stream, 6), BatchOutcome::kGap);
  EXPECT_TRUE(stream.behind());
  replay_all(stream, 2, 7);
  EXPECT_EQ(live(stream, 7), BatchOutcome::kDuplicate);
  EXPECT_EQ(live(stream, 8), BatchOutcome::kApplied);
  EXPECT_EQ(sink.removed.size(), 9u);
  EXPECT_EQ(sink.cleared, 0);
  EXPECT_TRUE(stream.whole());
}

TEST(KvEventStreamWithReplay, BufferThatIsTooShort_ForgetsAndIsPartial) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 2);
  live(stream, 20);
  EXPECT_EQ(stream.begin_replay(), 2u);
  for (std::uint64_t n = 11; n <= 20; ++n) EXPECT_EQ(replay(stream, n), ReplayStep::kGoOn);
  EXPECT_EQ(stream.on_replay_end(), ReplayStep::kDone);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_FALSE(stream.whole());
  EXPECT_EQ(stream.counts().too_short_buffers, 1u);
  stream.on_batch(21, bytes_of(batch_of({testing::cleared_map()})));
  EXPECT_TRUE(stream.whole());
}

TEST(KvEventStreamWithReplay, AnotherLife_IsKnownByTheBytesOfTheLastBatch) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 5);
  stream.on_disconnected();
  EXPECT_EQ(sink.cleared, 0);  // it may have been the connection only
  EXPECT_EQ(stream.begin_replay(), 5u);
  EXPECT_EQ(stream.on_replayed(5, bytes_of(batch_number(500))), ReplayStep::kAgain);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(stream.counts().restarts, 1u);
  replay_all(stream, 0, 8);
  EXPECT_TRUE(stream.whole());
}

TEST(KvEventStreamWithReplay, WorkerThatDoesNotKnowItsLastBatch_HasRestarted) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 5);
  stream.on_disconnected();
  stream.begin_replay();
  EXPECT_EQ(stream.on_replay_end(), ReplayStep::kAgain);
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(stream.begin_replay(), 0u);
  EXPECT_EQ(stream.on_replay_end(), ReplayStep::kDone);
  EXPECT_TRUE(stream.whole());
  EXPECT_EQ(live(stream, 0), BatchOutcome::kApplied);
}

TEST(KvEventStreamWithReplay, WorkerThatKeepsNoBatches_IsNotTakenForARestartedOne) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 5);
  stream.begin_replay();
  EXPECT_EQ(stream.on_replay_end(), ReplayStep::kWrong);
  EXPECT_EQ(sink.cleared, 0);
}

TEST(KvEventStreamWithReplay, LostConnectionToTheSameLife_CostsNothing) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 5);
  stream.on_disconnected();
  replay_all(stream, 5, 7);
  EXPECT_EQ(sink.cleared, 0);
  EXPECT_EQ(sink.removed.size(), 8u);
}

TEST(KvEventStreamWithReplay, HolesAndHostileOrder_AreNotBelieved) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  stream.begin_replay();
  EXPECT_EQ(replay(stream, 0), ReplayStep::kGoOn);
  EXPECT_EQ(replay(stream, 2), ReplayStep::kAgain);  // dropped on the way: asked for again, from 0 on
  EXPECT_EQ(stream.begin_replay(), 0u);
  EXPECT_EQ(replay(stream, 0), ReplayStep::kGoOn);
  EXPECT_EQ(replay(stream, 1), ReplayStep::kGoOn);
  EXPECT_EQ(replay(stream, 1), ReplayStep::kWrong);
  EXPECT_EQ(sink.removed.size(), 2u);
  stream.begin_replay();
  EXPECT_EQ(replay(stream, 0), ReplayStep::kWrong);  // before what was asked for
}

TEST(KvEventStreamWithReplay, Reset_IsALineThatNoReplayCrosses) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 5);
  stream.on_reset();
  live(stream, 6);
  live(stream, 7);
  stream.on_disconnected();
  stream.forget_unverified();
  replay_all(stream, 5, 8);             // 5 shows that it is the same life, and is not applied again
  EXPECT_EQ(sink.removed.size(), 11u);  // 0 to 5, 6 and 7, and 6 to 8
}

TEST(KvEventStreamWithReplay, ResetDuringAReplay_DropsTheRestOfIt) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  stream.begin_replay();
  replay(stream, 0);
  stream.on_reset();
  replay(stream, 1);
  stream.on_replayed(2, bytes_of(batch_of({testing::cleared_map()})));
  EXPECT_EQ(sink.removed.size(), 1u);
  EXPECT_EQ(sink.cleared, 0);
  EXPECT_EQ(stream.on_replay_end(), ReplayStep::kDone);
  EXPECT_EQ(sink.cleared, 1);  // which of the clears was meant is not known: from here on all counts
  EXPECT_FALSE(stream.whole());
  EXPECT_EQ(live(stream, 3), BatchOutcome::kApplied);
  EXPECT_EQ(sink.removed.size(), 2u);
}

TEST(KvEventStreamWithReplay, GivingUp_GoesOnLive) {
  testing::RecordingSink sink;
  KvEventStream stream(64, sink, true);
  replay_all(stream, 0, 2);
  live(stream, 9);
  stream.give_up();
  EXPECT_FALSE(stream.behind());
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_EQ(live(stream, 10), BatchOutcome::kApplied);
  EXPECT_FALSE(stream.whole());
  stream.start_over();
  EXPECT_TRUE(stream.behind());
  replay_all(stream, 0, 10);
  EXPECT_TRUE(stream.whole());
}

TEST(KvEventStream, OtherBlockSize_EndsTheBeliefInWhatWasStored) {
  testing::RecordingSink sink;
  KvEventStream stream(4, sink);
  stream.on_batch(0, bytes_of(batch_of({testing::stored_map({{1}, std::nullopt, {1, 2, 3, 4}, 4})})));
  stream.on_batch(1, bytes_of(batch_of({testing::stored_map({{2}, std::nullopt, {1, 2, 3, 4, 5, 6, 7, 8}, 8})})));
  EXPECT_EQ(sink.cleared, 1);
  EXPECT_FALSE(stream.whole());
}

}  // namespace
}  // namespace kvrouter
