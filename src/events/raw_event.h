// One KV event as it came off the wire, in either layout, before anything is concluded from it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "events/msgpack_reader.h"
#include "kvrouter/block_hash.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {

enum class EventType { kUnknown, kStored, kRemoved, kCleared };

// The fields; `invalid` if one of them could not be read.  The views and the reader point into the payload.
// The sizes of the vectors are bounded by the bytes of the payload, because the reader refuses counts that the
// remaining bytes cannot hold.
struct RawEvent {
  EventType type = EventType::kUnknown;
  bool invalid = false;
  bool has_hashes = false;
  std::vector<EngineHash> hashes;
  std::optional<EngineHash> parent;
  std::vector<TokenId> tokens;
  std::uint64_t block_size = 0;
  std::optional<std::int64_t> lora_id;
  std::string_view medium;
  std::string_view lora_name;
  std::optional<MsgpackReader> extra_keys;  // at the list of one entry a block
  std::optional<std::int64_t> group_idx;
  std::string_view spec_kind;
  std::string_view locality;

  // Keeps the capacity of the vectors.
  void clear() {
    type = EventType::kUnknown;
    invalid = has_hashes = false;
    hashes.clear();
    tokens.clear();
    parent.reset();
    block_size = 0;
    lora_id.reset();
    medium = lora_name = spec_kind = locality = {};
    extra_keys.reset();
    group_idx.reset();
  }
};

// Reads the next event, of either layout; `unknown_fields` grows by those that it does not know.  A reader that has
// failed on a field is put back to the field's start and made to skip it, so one bad value costs one event.  False only
// when the bytes cannot even be skipped.
bool read_event(MsgpackReader& in, RawEvent& event, std::uint64_t& unknown_fields);

// The namespace of the next block in an event's list of extra keys; `base` is that of the event's LoRA adapter, whose
// name leads an entry in the releases that send both.  False if the entry is none.
bool read_block_namespace(MsgpackReader& in, std::string_view lora_name, NamespaceHash base, NamespaceHash& out);

}  // namespace kvrouter
