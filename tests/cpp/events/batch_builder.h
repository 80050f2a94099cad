// Event batches as a worker would send them, for tests, in both layouts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "events/msgpack_writer.h"
#include "kvrouter/kv_event.h"

namespace kvrouter::testing {

// A batch [ts, events, 0] around events that are MessagePack already.
inline std::string batch_of(const std::vector<std::string>& events) {
  std::string out;
  MsgpackWriter writer(out);
  writer.array(3);
  writer.float64(1.5);
  writer.array(events.size());
  for (const std::string& event : events) out += event;
  writer.uint(0);
  return out;
}

struct StoredFields {
  std::vector<std::uint64_t> hashes;
  std::optional<std::uint64_t> parent;
  std::vector<std::uint64_t> tokens;
  std::uint64_t block_size = 4;
};

inline void write_list(MsgpackWriter& writer, const std::vector<std::uint64_t>& values) {
  writer.array(values.size());
  for (const std::uint64_t value : values) writer.uint(value);
}

// The map layout; `extra` is a run of key-value pairs that are MessagePack already, `num_extra` of them.
inline std::string stored_map(const StoredFields& fields, const std::string& extra = "", std::size_t num_extra = 0) {
  std::string out;
  MsgpackWriter writer(out);
  writer.map(5 + num_extra);
  writer.str("type");
  writer.str("BlockStored");
  writer.str("block_hashes");
  write_list(writer, fields.hashes);
  writer.str("parent_block_hash");
  fields.parent ? writer.uint(*fields.parent) : writer.nil();
  writer.str("token_ids");
  write_list(writer, fields.tokens);
  writer.str("block_size");
  writer.uint(fields.block_size);
  return out + extra;
}

inline std::string stored_array(const StoredFields& fields, const std::string& extra = "", std::size_t num_extra = 0) {
  std::string out;
  MsgpackWriter writer(out);
  writer.array(5 + num_extra);
  writer.str("BlockStored");
  write_list(writer, fields.hashes);
  fields.parent ? writer.uint(*fields.parent) : writer.nil();
  write_list(writer, fields.tokens);
  writer.uint(fields.block_size);
  return out + extra;
}

inline std::string removed_map(const std::vector<std::uint64_t>& hashes, const std::string& extra = "",
                               std::size_t num_extra = 0) {
  std::string out;
  MsgpackWriter writer(out);
  writer.map(2 + num_extra);
  writer.str("type");
  writer.str("BlockRemoved");
  writer.str("block_hashes");
  write_list(writer, hashes);
  return out + extra;
}

inline std::string cleared_map() {
  std::string out;
  MsgpackWriter writer(out);
  writer.map(1);
  writer.str("type");
  writer.str("AllBlocksCleared");
  return out;
}

inline std::string pair(std::string_view key, std::string_view value) {
  std::string out;
  MsgpackWriter writer(out);
  writer.str(key);
  writer.str(value);
  return out;
}

inline std::string pair(std::string_view key, std::uint64_t value) {
  std::string out;
  MsgpackWriter writer(out);
  writer.str(key);
  writer.uint(value);
  return out;
}

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// Keeps what it receives.
class RecordingSink final : public KvEventSink {
 public:
  struct Stored {
    std::optional<EngineHash> parent;
    std::vector<StoredBlock> blocks;
    bool operator==(const Stored&) const = default;
  };
  std::vector<Stored> stored;
  std::vector<std::vector<EngineHash>> removed;
  int cleared = 0;

  void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) override {
    stored.push_back({parent, {blocks.begin(), blocks.end()}});
  }
  void on_removed(std::span<const EngineHash> blocks) override { removed.emplace_back(blocks.begin(), blocks.end()); }
  void on_cleared() override { ++cleared; }
};

}  // namespace kvrouter::testing
