// Batches made to hurt: what is usable in them is used, and the rest costs itself alone.
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <string_view>

#include "events/batch_builder.h"
#include "index/index_sink.h"
#include "kvrouter/kv_event.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {
namespace {

using testing::batch_of;
using testing::bytes_of;
using testing::cleared_map;
using testing::pair;
using testing::RecordingSink;
using testing::removed_map;
using testing::stored_map;

constexpr std::size_t kMillion = 1'000'000;

// [ts, a million times `event`, 0]
std::string million_of(const std::string& event) {
  std::string out;
  MsgpackWriter writer(out);
  writer.array(3);
  writer.float64(1.5);
  writer.array(kMillion);
  out.reserve(out.size() + kMillion * event.size() + 1);
  for (std::size_t i = 0; i < kMillion; ++i) out += event;
  writer.uint(0);
  return out;
}

TEST(HostileBatches, AMillionEvents_AreAllRead) {
  PrefixIndex index(2);
  IndexSink sink(index, 0);
  KvEventDecoder decoder(4);
  EXPECT_TRUE(decoder.decode(bytes_of(million_of(cleared_map())), sink).ok);
  EXPECT_EQ(decoder.counts().cleared, kMillion);
  EXPECT_TRUE(decoder.decode(bytes_of(million_of(removed_map({7}))), sink).ok);
  EXPECT_EQ(decoder.counts().removed_blocks, kMillion);
  EXPECT_TRUE(decoder.decode(bytes_of(million_of("\xc0")), sink).ok);  // nil is no event
  EXPECT_EQ(decoder.counts().skipped_invalid, kMillion);
  EXPECT_EQ(index.held_blocks(0), 0u);
}

TEST(HostileBatches, AMillionBlocksWithoutAParent_AreBounded) {
  PrefixIndex index(1);
  IndexSink sink(index, 0);
  KvEventDecoder decoder(1);
  std::string events;
  MsgpackWriter writer(events);
  writer.array(3);
  writer.float64(1.5);
  writer.array(kMillion);
  for (std::uint64_t i = 0; i < kMillion; ++i) {
    events += stored_map({.hashes = {2 * i + 1}, .parent = 2 * i, .tokens = {1}, .block_size = 1});
  }
  writer.uint(0);
  EXPECT_TRUE(decoder.decode(bytes_of(events), sink).ok);
  EXPECT_LE(index.stats().orphans, PrefixIndex::kMaxOrphansPerWorker);
  EXPECT_EQ(index.stats().orphans + index.stats().orphans_dropped, kMillion);
}

TEST(HostileBatches, AnEventWithAMillionBlocks_IsIndexed) {
  testing::StoredFields fields{.hashes = {}, .parent = std::nullopt, .tokens = {}, .block_size = 1};
  for (std::uint64_t i = 0; i < kMillion; ++i) {
    fields.hashes.push_back(i);
    fields.tokens.push_back(i);
  }
  PrefixIndex index(1);
  IndexSink sink(index, 0);
  KvEventDecoder decoder(1);
  EXPECT_TRUE(decoder.decode(bytes_of(batch_of({stored_map(fields)})), sink).ok);
  EXPECT_EQ(index.held_blocks(0), kMillion);
}

TEST(HostileBatches, DepthBomb_WhereverAValueMayStand) {
  const std::string bomb = std::string(kMillion, '\x91') + '\xc0';
  for (const std::string_view key :
       {"block_hashes", "parent_block_hash", "token_ids", "extra_keys", "medium", "surprise"}) {
    std::string field;
    MsgpackWriter(field).str(key);
    KvEventDecoder decoder(4);
    RecordingSink sink;
    const std::string event =
        stored_map({.hashes = {1}, .parent = std::nullopt, .tokens = {1, 2, 3, 4}}, field + bomb, 1);
    EXPECT_TRUE(decoder.decode(bytes_of(batch_of({event, removed_map({1})})), sink).ok) << key;
    EXPECT_EQ(sink.removed.size(), 1u) << key;
    EXPECT_EQ(sink.stored.size(), key == "surprise" ? 1u : 0u) << key;
  }
}

TEST(HostileBatches, HugeLengths_EndTheBatch) {
  const std::string head = "\x93\xc0\x91";
  for (const std::string& lie : {std::string("\xdd\xff\xff\xff\xff", 5), std::string("\xdf\xff\xff\xff\xff", 5),
                                 std::string("\xdb\xff\xff\xff\xff", 5), std::string("\xc6\xff\xff\xff\xff", 5),
                                 std::string("\xc9\xff\xff\xff\xff\x01", 6), std::string("\xdd\x7f\xff\xff\xff", 5)}) {
    KvEventDecoder decoder(4);
    RecordingSink sink;
    EXPECT_FALSE(decoder.decode(bytes_of(head + lie), sink).ok);
    EXPECT_FALSE(decoder.decode(bytes_of(head + "\x81\xa9token_ids" + lie), sink).ok);
    EXPECT_EQ(decoder.counts().malformed_batches, 2u);
  }
}

// A stored event, sound but for one field that is given once more with a value of raw bytes.
bool is_used(const std::string& key, const std::string& value) {
  std::string field;
  MsgpackWriter(field).str(key);
  KvEventDecoder decoder(4);
  RecordingSink sink;
  const std::string event =
      stored_map({.hashes = {1}, .parent = std::nullopt, .tokens = {1, 2, 3, 4}}, field + value, 1);
  EXPECT_TRUE(decoder.decode(bytes_of(batch_of({event})), sink).ok) << key;
  return !sink.stored.empty();
}

TEST(HostileBatches, NegativeNumbers_CostTheirEvent) {
  const std::string minus_one = "\xff", least = std::string("\xd3\x80\0\0\0\0\0\0\0", 9);
  for (const std::string& value : {minus_one, least}) {
    EXPECT_FALSE(is_used("block_size", value));
    EXPECT_FALSE(is_used("parent_block_hash", value));
    EXPECT_FALSE(is_used("block_hashes", "\x91" + value));
    EXPECT_FALSE(is_used("token_ids", "\x94\x01\x02\x03" + value));
    EXPECT_FALSE(is_used("group_idx", value));
    EXPECT_TRUE(is_used("lora_id", value));  // a name like any other
  }
}

TEST(HostileBatches, NumbersBeyondTheirType_CostTheirEvent) {
  const std::string most = "\xcf\xff\xff\xff\xff\xff\xff\xff\xff";
  EXPECT_FALSE(is_used("token_ids", "\x94\x01\x02\x03" + most));
  EXPECT_FALSE(is_used("token_ids", "\x94\x01\x02\x03" + std::string("\xcf\0\0\0\1\0\0\0\0", 9)));
  EXPECT_FALSE(is_used("block_size", most));
  EXPECT_FALSE(is_used("group_idx", most));
  EXPECT_FALSE(is_used("lora_id", most));
  EXPECT_FALSE(is_used("block_size", std::string("\xcb\x7f\xf8\0\0\0\0\0\0", 9)));  // not a number
  EXPECT_TRUE(is_used("parent_block_hash", most));
}

TEST(HostileBatches, InvalidUtf8_IsBytesLikeAnyOther) {
  EXPECT_TRUE(is_used("lora_name", "\xa2\xff\xc0"));
  EXPECT_FALSE(is_used("medium", "\xa2\xff\xc0"));  // other memory than the GPU's
  EXPECT_FALSE(is_used("type", "\xa2\xff\xc0"));    // another kind of event
}

}  // namespace
}  // namespace kvrouter
