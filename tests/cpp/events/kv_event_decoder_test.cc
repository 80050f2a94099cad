#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <fstream>

#include "events/batch_builder.h"
#include "events/msgpack_reader.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {
namespace {

using namespace kvrouter::testing;  // NOLINT: the builders are this file's vocabulary

const StoredFields kTwoBlocks = {{11, 12}, 7, {1, 2, 3, 4, 5, 6, 7, 8}, 4};

std::vector<StoredBlock> two_blocks(NamespaceHash ns = 0) {
  const std::vector<TokenId> a = {1, 2, 3, 4}, b = {5, 6, 7, 8};
  return {{hash_block(a, ns), 11}, {hash_block(b, ns), 12}};
}

struct Decoded {
  RecordingSink sink;
  DecodeResult result;
  KvEventCounts counts;
};

Decoded decode(const std::vector<std::string>& events, std::size_t block_size = 4) {
  KvEventDecoder decoder(block_size);
  Decoded out;
  out.result = decoder.decode(bytes_of(batch_of(events)), out.sink);
  out.counts = decoder.counts();
  return out;
}

TEST(KvEventDecoder, BothLayouts_GiveTheSameEvent) {
  for (const std::string& event : {stored_map(kTwoBlocks), stored_array(kTwoBlocks)}) {
    const Decoded out = decode({event});
    EXPECT_TRUE(out.result.ok) << out.result.error;
    ASSERT_EQ(out.sink.stored.size(), 1u);
    EXPECT_EQ(out.sink.stored[0], (RecordingSink::Stored{7, two_blocks()}));
    EXPECT_EQ(out.counts.stored_blocks, 2u);
  }
}

TEST(KvEventDecoder, RemovedAndCleared) {
  const Decoded out = decode({removed_map({1, UINT64_MAX}), cleared_map()});
  EXPECT_EQ(out.sink.removed, (std::vector<std::vector<EngineHash>>{{1, UINT64_MAX}}));
  EXPECT_EQ(out.sink.cleared, 1);
}

TEST(KvEventDecoder, ArrayLayoutOfRemovedAndCleared) {
  std::string removed, cleared;
  MsgpackWriter writer(removed);
  writer.array(4);
  writer.str("BlockRemoved");
  write_list(writer, {5});
  writer.str("GPU");
  writer.nil();
  MsgpackWriter clear_writer(cleared);
  clear_writer.array(1);
  clear_writer.str("AllBlocksCleared");
  const Decoded out = decode({removed, cleared});
  EXPECT_EQ(out.sink.removed, (std::vector<std::vector<EngineHash>>{{5}}));
  EXPECT_EQ(out.sink.cleared, 1);
}

TEST(KvEventDecoder, ByteStringHashes_AreNamesToo) {
  std::string stored, removed;
  const std::string name(32, '\x01');
  MsgpackWriter writer(stored);
  writer.map(5);
  writer.str("type");
  writer.str("BlockStored");
  writer.str("block_hashes");
  writer.array(1);
  writer.bin(name);
  writer.str("parent_block_hash");
  writer.nil();
  writer.str("token_ids");
  write_list(writer, {1, 2, 3, 4});
  writer.str("block_size");
  writer.uint(4);
  MsgpackWriter remove_writer(removed);
  remove_writer.map(2);
  remove_writer.str("type");
  remove_writer.str("BlockRemoved");
  remove_writer.str("block_hashes");
  remove_writer.array(1);
  remove_writer.bin(name);
  const Decoded out = decode({stored, removed});
  ASSERT_EQ(out.sink.stored.size(), 1u);
  EXPECT_EQ(out.sink.stored[0].parent, std::nullopt);
  EXPECT_EQ(out.sink.removed, (std::vector<std::vector<EngineHash>>{{out.sink.stored[0].blocks[0].engine}}));
}

TEST(KvEventDecoder, UnknownTypesAndFields_AreSkippedAndCounted) {
  std::string unknown;
  MsgpackWriter writer(unknown);
  writer.map(2);
  writer.str("type");
  writer.str("BlockMoved");
  writer.str("from");
  write_list(writer, {1, 2, 3});
  const Decoded out = decode({unknown, stored_map(kTwoBlocks, pair("colour", "blue"), 1)});
  EXPECT_TRUE(out.result.ok);
  EXPECT_EQ(out.sink.stored.size(), 1u);
  EXPECT_EQ(out.counts.skipped_unknown_type, 1u);
  EXPECT_EQ(out.counts.skipped_unknown_field, 2u);
}

TEST(KvEventDecoder, OtherBlockSize_IsSaid) {
  KvEventDecoder decoder(64);
  RecordingSink sink;
  decoder.decode(bytes_of(batch_of({stored_map(kTwoBlocks)})), sink);
  EXPECT_TRUE(sink.stored.empty());
  EXPECT_EQ(decoder.counts().skipped_block_size, 1u);
  EXPECT_EQ(decoder.mismatched_block_size(), 4u);
}

TEST(KvEventDecoder, OnlyAttentionGroups_AreIndexed) {
  const auto in_group = [](std::uint64_t group, std::string_view kind) {
    return stored_map(kTwoBlocks, pair("group_idx", group) + pair("kv_cache_spec_kind", kind), 2);
  };
  const Decoded out = decode({in_group(0, "full_attention"), in_group(1, "sliding_window"), in_group(2, "mamba"),
                              in_group(3, "mla_attention"), removed_map({1}, pair("group_idx", 0), 1),
                              removed_map({2}, pair("group_idx", 1), 1), removed_map({3}, pair("group_idx", 3), 1)});
  EXPECT_EQ(out.sink.stored.size(), 2u);
  EXPECT_EQ(out.sink.removed, (std::vector<std::vector<EngineHash>>{{1}, {3}}));
  EXPECT_EQ(out.counts.skipped_group, 3u);
}

TEST(KvEventDecoder, NonAttentionGroup_MayHaveTokensThatDoNotFit) {
  const StoredFields odd = {{1}, std::nullopt, {1, 2, 3}, 4};
  const Decoded out = decode({stored_map(odd, pair("group_idx", 1) + pair("kv_cache_spec_kind", "mamba"), 2)});
  EXPECT_EQ(out.counts.skipped_group, 1u);
  EXPECT_EQ(out.counts.skipped_invalid, 0u);
}

TEST(KvEventDecoder, OtherMemoryThanTheGpus_IsLeftOut) {
  const Decoded out =
      decode({stored_map(kTwoBlocks, pair("medium", "CPU"), 1), stored_map(kTwoBlocks, pair("medium", "GPU"), 1),
              removed_map({11}, pair("medium", "STORAGE"), 1), stored_map(kTwoBlocks, pair("locality", "REMOTE"), 1)});
  EXPECT_EQ(out.sink.stored.size(), 1u);
  EXPECT_TRUE(out.sink.removed.empty());
  EXPECT_EQ(out.counts.skipped_medium, 3u);
}

TEST(KvEventDecoder, LoraName_IsANamespace) {
  const Decoded out = decode({stored_map(kTwoBlocks, pair("lora_name", "a"), 1)});
  EXPECT_EQ(out.sink.stored[0].blocks, two_blocks(lora_namespace("a")));
}

TEST(KvEventDecoder, LoraNameInExtraKeys_CountsOnce) {
  std::string keys;
  MsgpackWriter writer(keys);
  writer.str("extra_keys");
  writer.array(2);
  for (int i = 0; i < 2; ++i) {
    writer.array(1);
    writer.str("a");
  }
  const Decoded out = decode({stored_map(kTwoBlocks, pair("lora_name", "a") + keys, 2)});
  EXPECT_EQ(out.sink.stored[0].blocks, two_blocks(lora_namespace("a")));
}

TEST(KvEventDecoder, ExtraKeys_SeparateEqualTokens) {
  std::string keys;
  MsgpackWriter writer(keys);
  writer.str("extra_keys");
  writer.array(2);
  writer.array(1);
  writer.str("salt");
  writer.nil();
  const Decoded out = decode({stored_map(kTwoBlocks, keys, 1)});
  const std::vector<StoredBlock> plain = two_blocks();
  EXPECT_NE(out.sink.stored[0].blocks[0].local, plain[0].local);
  EXPECT_EQ(out.sink.stored[0].blocks[1], plain[1]);
}

TEST(KvEventDecoder, EventThatContradictsItself_CostsItselfOnly) {
  const StoredFields too_few_tokens = {{1, 2}, std::nullopt, {1, 2, 3, 4}, 4};
  const StoredFields token_too_large = {{1}, std::nullopt, {1, 2, 3, 1ull << 32}, 4};
  const StoredFields zero_block_size = {{1}, std::nullopt, {1}, 0};
  const Decoded out = decode({stored_map(too_few_tokens), stored_map(token_too_large), stored_map(zero_block_size),
                              removed_map({1}, pair("medium", 3), 1), stored_map(kTwoBlocks)});
  EXPECT_TRUE(out.result.ok);
  EXPECT_EQ(out.sink.stored.size(), 1u);
  EXPECT_EQ(out.counts.skipped_invalid, 4u);
}

TEST(KvEventDecoder, DepthBomb_IsPassedOver) {
  std::string bomb(100'000, '\x91');  // arrays in arrays
  bomb += '\xc0';
  std::string key;
  MsgpackWriter writer(key);
  writer.str("colour");
  const Decoded out = decode({stored_map(kTwoBlocks, key + bomb, 1)});
  EXPECT_TRUE(out.result.ok) << out.result.error;
  EXPECT_EQ(out.sink.stored.size(), 1u);
}

TEST(KvEventDecoder, HugeCounts_AreRefusedBeforeTheyAllocate) {
  const std::string array32 = std::string("\x93\xcb\0\0\0\0\0\0\0\0", 10) + "\xdd\xff\xff\xff\xff";
  KvEventDecoder decoder(4);
  RecordingSink sink;
  EXPECT_FALSE(decoder.decode(bytes_of(array32), sink).ok);
}

TEST(KvEventDecoder, TruncatedBatch_DeliversWhatCameBefore) {
  const std::string whole = batch_of({removed_map({1}), stored_map(kTwoBlocks)});
  KvEventDecoder decoder(4);
  for (std::size_t size = 0; size + 1 < whole.size(); ++size) {  // the last byte is the rank, which may be absent
    RecordingSink sink;
    const DecodeResult result = decoder.decode(bytes_of(whole.substr(0, size)), sink);
    EXPECT_FALSE(result.ok) << size;
    EXPECT_FALSE(result.error.empty());
    EXPECT_TRUE(sink.stored.empty()) << size;
  }
  EXPECT_EQ(decoder.counts().malformed_batches, whole.size() - 1);
}

RC_GTEST_PROP(KvEventDecoderProperty, ArbitraryBytes_NeverCrash, (const std::vector<char>& noise)) {
  KvEventDecoder decoder(4);
  RecordingSink sink;
  decoder.decode(bytes_of(std::string(noise.begin(), noise.end())), sink);
}

RC_GTEST_PROP(KvEventDecoderProperty, MutatedBatches_NeverCrash, ()) {
  std::string batch = batch_of(
      {stored_map(kTwoBlocks, pair("group_idx", 1), 1), removed_map({1, 2}), cleared_map(), stored_array(kTwoBlocks)});
  const auto flips = *rc::gen::container<std::vector<std::pair<std::size_t, char>>>(
      rc::gen::pair(rc::gen::inRange<std::size_t>(0, batch.size()), rc::gen::arbitrary<char>()));
  for (const auto& [at, value] : flips) batch[at] = value;
  KvEventDecoder decoder(4);
  RecordingSink sink;
  decoder.decode(bytes_of(batch), sink);
  for (const auto& stored : sink.stored) RC_ASSERT(!stored.blocks.empty());
}

// --- MsgpackReader ---

RC_GTEST_PROP(MsgpackReader, ReadsBackWhatTheWriterWrote,
              (std::uint64_t u, std::int64_t i, const std::string& s, const std::vector<std::uint8_t>& blob)) {
  const double d = static_cast<double>(i) / 3.0;
  const std::string bin(blob.begin(), blob.end());
  std::string out;
  MsgpackWriter writer(out);
  writer.uint(u);
  writer.integer(i);
  writer.str(s);
  writer.bin(bin);
  writer.float64(d);
  const std::size_t before_map = out.size();
  writer.map(1);
  writer.str(s);
  writer.array(2);
  writer.nil();
  writer.boolean(true);

  MsgpackReader in(bytes_of(out));
  std::uint64_t u2 = 0;
  std::int64_t i2 = 0;
  std::string_view s2, b2;
  double d2 = 0;
  RC_ASSERT(in.read_uint(u2) && in.read_int(i2) && in.read_string(s2) && in.read_binary(b2) && in.read_double(d2));
  RC_ASSERT(u2 == u && i2 == i && s2 == s && b2 == bin && d2 == d);
  RC_ASSERT(in.position() == before_map);
  RC_ASSERT(in.skip() && in.remaining() == 0u);
  RC_ASSERT(!in.skip());

  MsgpackReader skipper(bytes_of(out));
  for (int n = 0; n < 6; ++n) RC_ASSERT(skipper.skip());
  RC_ASSERT(skipper.remaining() == 0u);
}

TEST(MsgpackReader, SignsAndRanges) {
  std::string out;
  MsgpackWriter writer(out);
  writer.integer(-1);
  std::uint64_t u = 0;
  EXPECT_FALSE(MsgpackReader(bytes_of(out)).read_uint(u));
  out.clear();
  writer.uint(UINT64_MAX);
  std::int64_t i = 0;
  EXPECT_FALSE(MsgpackReader(bytes_of(out)).read_int(i));
}

// --- The real thing ---

// Frames of a session with two real vLLM 0.32.0 workers: u32 frames, then each u32 length and bytes.
TEST(KvEventDecoder, RealVllmSession) {
  std::ifstream file(KVROUTER_GOLDEN_DIR "/vllm-0.32.0.bin", std::ios::binary);
  const std::string data((std::istreambuf_iterator<char>(file)), {});
  ASSERT_FALSE(data.empty());
  KvEventDecoder decoder(64);
  RecordingSink sink;
  std::size_t at = 0;
  const auto read_u32 = [&] {
    std::uint32_t value = 0;
    std::memcpy(&value, data.data() + at, sizeof value);
    at += sizeof value;
    return value;
  };
  while (at < data.size()) {
    const std::uint32_t frames = read_u32();
    ASSERT_EQ(frames, 3u);
    for (std::uint32_t f = 0; f < frames; ++f) {
      const std::uint32_t size = read_u32();
      if (f == 2) {
        const DecodeResult result = decoder.decode(bytes_of(data.substr(at, size)), sink);
        EXPECT_TRUE(result.ok) << result.error;
      }
      at += size;
    }
  }
  // A 2,048-token prompt (32 blocks) on worker 0, its last block again, 16 blocks of a prompt that shares half of it,
  // the prompt on worker 1, a reset, and the prompt once more.
  ASSERT_GE(sink.stored.size(), 4u);
  EXPECT_EQ(sink.stored[0].blocks.size(), 32u);
  EXPECT_EQ(sink.stored[0].parent, std::nullopt);
  EXPECT_EQ(sink.cleared, 1);
  const KvEventCounts& counts = decoder.counts();
  EXPECT_EQ(counts.skipped_invalid + counts.skipped_unknown_type + counts.skipped_unknown_field +
                counts.skipped_block_size + counts.skipped_group + counts.skipped_medium,
            0u);
}

}  // namespace
}  // namespace kvrouter
