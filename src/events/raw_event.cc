#include "events/raw_event.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <span>

namespace kvrouter {
namespace {

enum class Field {
  kUnknown,
  kType,
  kBlockHashes,
  kParent,
  kTokenIds,
  kBlockSize,
  kLoraId,
  kMedium,
  kLoraName,
  kExtraKeys,
  kGroupIdx,
  kSpecKind,
  kLocality,
  kUnused,  // known, and of no use to a router
};

// The order of fields after the tag in the array layout; releases append to it.
constexpr std::array kStoredPositions = {Field::kBlockHashes, Field::kParent,   Field::kTokenIds, Field::kBlockSize,
                                         Field::kLoraId,      Field::kMedium,   Field::kLoraName, Field::kExtraKeys,
                                         Field::kGroupIdx,    Field::kSpecKind, Field::kUnused};
constexpr std::array kRemovedPositions = {Field::kBlockHashes, Field::kMedium, Field::kGroupIdx};

Field field_named(std::string_view name) {
  struct Entry {
    std::string_view name;
    Field field;
  };
  static constexpr std::array kFields = {
      Entry{"type", Field::kType},
      Entry{"block_hashes", Field::kBlockHashes},
      Entry{"parent_block_hash", Field::kParent},
      Entry{"token_ids", Field::kTokenIds},
      Entry{"block_size", Field::kBlockSize},
      Entry{"lora_id", Field::kLoraId},
      Entry{"medium", Field::kMedium},
      Entry{"lora_name", Field::kLoraName},
      Entry{"extra_keys", Field::kExtraKeys},
      Entry{"group_idx", Field::kGroupIdx},
      Entry{"kv_cache_spec_kind", Field::kSpecKind},
      Entry{"kv_cache_spec_sliding_window", Field::kUnused},
      Entry{"locality", Field::kLocality},
      Entry{"ownership", Field::kUnused},
      Entry{"session_id", Field::kUnused},
  };
  for (const Entry& entry : kFields) {
    if (entry.name == name) return entry.field;
  }
  return Field::kUnknown;
}

EventType type_named(std::string_view tag) {
  if (tag == "BlockStored") return EventType::kStored;
  if (tag == "BlockRemoved") return EventType::kRemoved;
  if (tag == "AllBlocksCleared") return EventType::kCleared;
  return EventType::kUnknown;
}

bool read_engine_hash(MsgpackReader& in, EngineHash& out) {
  std::string_view bytes;
  switch (in.peek()) {
    case MsgpackType::kBinary:
      if (!in.read_binary(bytes)) return false;
      break;
    case MsgpackType::kString:
      if (!in.read_string(bytes)) return false;
      break;
    default:
      return in.read_uint(out);
  }
  out = XXH3_64bits(bytes.data(), bytes.size());
  return true;
}

bool read_optional_string(MsgpackReader& in, std::string_view& out) {
  return in.peek() == MsgpackType::kNil ? in.read_nil() : in.read_string(out);
}

bool read_optional_int(MsgpackReader& in, std::optional<std::int64_t>& out) {
  if (in.peek() == MsgpackType::kNil) return in.read_nil();
  std::int64_t value = 0;
  if (!in.read_int(value)) return false;
  out = value;
  return true;
}

bool read_hashes(MsgpackReader& in, std::vector<EngineHash>& out) {
  std::size_t count = 0;
  if (!in.read_array(count)) return false;
  out.resize(count);
  return std::all_of(out.begin(), out.end(), [&](EngineHash& hash) { return read_engine_hash(in, hash); });
}

bool read_tokens(MsgpackReader& in, std::vector<TokenId>& out) {
  std::size_t count = 0;
  if (!in.read_array(count)) return false;
  out.resize(count);
  for (TokenId& token : out) {
    std::uint64_t value = 0;
    if (!in.read_uint(value) || value > UINT32_MAX) return false;
    token = static_cast<TokenId>(value);
  }
  return true;
}

bool read_field(MsgpackReader& in, Field field, RawEvent& event) {
  std::string_view text;
  switch (field) {
    case Field::kType:
      if (!in.read_string(text)) return false;
      event.type = type_named(text);
      return true;
    case Field::kBlockHashes:
      event.has_hashes = true;
      return read_hashes(in, event.hashes);
    case Field::kParent: {
      if (in.peek() == MsgpackType::kNil) return in.read_nil();
      EngineHash hash = 0;
      if (!read_engine_hash(in, hash)) return false;
      event.parent = hash;
      return true;
    }
    case Field::kTokenIds:
      return read_tokens(in, event.tokens);
    case Field::kBlockSize:
      return in.read_uint(event.block_size);
    case Field::kLoraId:
      return read_optional_int(in, event.lora_id);
    case Field::kMedium:
      return read_optional_string(in, event.medium);
    case Field::kLoraName:
      return read_optional_string(in, event.lora_name);
    case Field::kExtraKeys:
      if (in.peek() != MsgpackType::kNil) event.extra_keys = in;
      return in.skip();
    case Field::kGroupIdx:
      return read_optional_int(in, event.group_idx);
    case Field::kSpecKind:
      return read_optional_string(in, event.spec_kind);
    case Field::kLocality:
      return read_optional_string(in, event.locality);
    case Field::kUnknown:
    case Field::kUnused:
      return in.skip();
  }
  return false;
}

// Adds one value (with its nested lists, to a fixed depth) to the namespace.
bool add_key(MsgpackReader& in, NamespaceBuilder& out, int depth) {
  constexpr int kMaxDepth = 8;  // vLLM nests twice
  std::string_view text;
  std::int64_t integer = 0;
  double real = 0;
  bool flag = false;
  std::size_t count = 0;
  switch (in.peek()) {
    case MsgpackType::kNil:
      out.add_null();
      return in.read_nil();
    case MsgpackType::kBool:
      if (!in.read_bool(flag)) return false;
      out.add_int(flag ? 1 : 0);
      return true;
    case MsgpackType::kInt:
      if (!in.read_int(integer)) return false;
      out.add_int(integer);
      return true;
    case MsgpackType::kFloat:
      if (!in.read_double(real)) return false;
      out.add_float(real);
      return true;
    case MsgpackType::kString:
      if (!in.read_string(text)) return false;
      out.add_string(text);
      return true;
    case MsgpackType::kBinary:
      if (!in.read_binary(text)) return false;
      out.add_bytes(text);
      return true;
    case MsgpackType::kArray:
      if (depth == kMaxDepth || !in.read_array(count)) return false;
      out.begin_list(count);
      for (std::size_t i = 0; i < count; ++i) {
        if (!add_key(in, out, depth + 1)) return false;
      }
      return true;
    default:
      return false;
  }
}

bool read_one_field(MsgpackReader& in, Field field, RawEvent& event, std::uint64_t& unknown_fields) {
  if (field == Field::kUnknown) ++unknown_fields;
  const MsgpackReader start = in;
  if (read_field(in, field, event)) return true;
  event.invalid = true;
  in = start;
  return in.skip();
}

bool read_map_event(MsgpackReader& in, RawEvent& event, std::uint64_t& unknown_fields) {
  std::size_t count = 0;
  if (!in.read_map(count)) return false;
  for (std::size_t i = 0; i < count; ++i) {
    Field field = Field::kUnknown;
    std::string_view name;
    if (in.peek() == MsgpackType::kString) {
      if (!in.read_string(name)) return false;
      field = field_named(name);
    } else if (!in.skip()) {
      return false;
    }
    if (!read_one_field(in, field, event, unknown_fields)) return false;
  }
  return true;
}

bool read_array_event(MsgpackReader& in, RawEvent& event, std::uint64_t& unknown_fields) {
  std::size_t count = 0;
  if (!in.read_array(count)) return false;
  if (count == 0) {
    event.invalid = true;
    return true;
  }
  if (!read_one_field(in, Field::kType, event, unknown_fields)) return false;
  std::span<const Field> positions;
  if (event.type == EventType::kStored) positions = kStoredPositions;
  if (event.type == EventType::kRemoved) positions = kRemovedPositions;
  const bool known = event.type != EventType::kUnknown;
  for (std::size_t i = 0; i + 1 < count; ++i) {
    const Field field = i < positions.size() ? positions[i] : known ? Field::kUnknown : Field::kUnused;
    if (!read_one_field(in, field, event, unknown_fields)) return false;
  }
  return true;
}

}  // namespace

bool read_event(MsgpackReader& in, RawEvent& event, std::uint64_t& unknown_fields) {
  switch (in.peek()) {
    case MsgpackType::kMap:
      return read_map_event(in, event, unknown_fields);
    case MsgpackType::kArray:
      return read_array_event(in, event, unknown_fields);
    default:
      event.invalid = true;
      return in.skip();
  }
}

bool read_block_namespace(MsgpackReader& in, std::string_view lora_name, NamespaceHash base, NamespaceHash& out) {
  if (in.peek() == MsgpackType::kNil) {
    out = base;
    return in.read_nil();
  }
  std::size_t count = 0;
  if (!in.read_array(count)) return false;
  NamespaceBuilder builder(base);
  for (std::size_t i = 0; i < count; ++i) {
    if (i == 0 && !lora_name.empty() && in.peek() == MsgpackType::kString) {
      MsgpackReader ahead = in;
      std::string_view first;
      if (ahead.read_string(first) && first == lora_name) {
        in = ahead;
        continue;
      }
    }
    if (!add_key(in, builder, 0)) return false;
  }
  out = builder.finish();
  return true;
}

}  // namespace kvrouter
