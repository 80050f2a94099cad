// Invariants:
// - A reader that has failed on a field is put back to the field's start and made to skip it, so one bad value costs
//   one event.  Only a value that cannot even be skipped (truncated bytes) ends the batch.
// - The scratch vectors keep their capacity between events.  Their sizes are bounded by the bytes of the payload,
//   because the reader refuses counts that the remaining bytes cannot hold.
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <vector>

#include "events/msgpack_reader.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {
namespace {

enum class EventType { kUnknown, kStored, kRemoved, kCleared };

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

// One event's fields as they came.
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

// The namespace of the next block in a list of extra keys.  The LoRA name leads an entry in the releases that send
// both; it is in `base` already.
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

}  // namespace

class KvEventDecoder::Impl {
 public:
  explicit Impl(std::size_t block_size) : block_size_(block_size) {}

  DecodeResult decode(std::span<const std::byte> payload, KvEventSink& sink) {
    ++counts_.batches;
    MsgpackReader in(payload);
    std::size_t fields = 0;
    double timestamp = 0;
    std::size_t events = 0;
    if (!in.read_array(fields) || fields < 2 || !in.read_double(timestamp) || !in.read_array(events)) {
      return malformed(in, "not an array [timestamp, events, ...]");
    }
    for (std::size_t i = 0; i < events; ++i) {
      event_.clear();
      if (!read_event(in)) return malformed(in, "truncated or malformed event " + std::to_string(i));
      deliver(sink);
    }
    return {};
  }

  const KvEventCounts& counts() const { return counts_; }
  std::size_t mismatched_block_size() const { return mismatched_block_size_; }
  void reset() { attention_groups_ = 0; }

 private:
  DecodeResult malformed(const MsgpackReader& in, std::string what) {
    ++counts_.malformed_batches;
    return {false, std::move(what) + " at byte " + std::to_string(in.position())};
  }

  // False only when the bytes themselves are broken.
  bool read_event(MsgpackReader& in) {
    switch (in.peek()) {
      case MsgpackType::kMap:
        return read_map_event(in);
      case MsgpackType::kArray:
        return read_array_event(in);
      default:
        event_.invalid = true;
        return in.skip();
    }
  }

  bool read_one_field(MsgpackReader& in, Field field) {
    if (field == Field::kUnknown) ++counts_.skipped_unknown_field;
    const MsgpackReader start = in;
    if (read_field(in, field, event_)) return true;
    event_.invalid = true;
    in = start;
    return in.skip();
  }

  bool read_map_event(MsgpackReader& in) {
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
      if (!read_one_field(in, field)) return false;
    }
    return true;
  }

  bool read_array_event(MsgpackReader& in) {
    std::size_t count = 0;
    if (!in.read_array(count)) return false;
    if (count == 0) {
      event_.invalid = true;
      return true;
    }
    if (!read_one_field(in, Field::kType)) return false;
    std::span<const Field> positions;
    if (event_.type == EventType::kStored) positions = kStoredPositions;
    if (event_.type == EventType::kRemoved) positions = kRemovedPositions;
    const bool known = event_.type != EventType::kUnknown;
    for (std::size_t i = 0; i + 1 < count; ++i) {
      const Field field = i < positions.size() ? positions[i] : known ? Field::kUnknown : Field::kUnused;
      if (!read_one_field(in, field)) return false;
    }
    return true;
  }

  void deliver(KvEventSink& sink) {
    if (event_.invalid) {
      ++counts_.skipped_invalid;
      return;
    }
    switch (event_.type) {
      case EventType::kUnknown:
        ++counts_.skipped_unknown_type;
        return;
      case EventType::kCleared:
        ++counts_.cleared;
        sink.on_cleared();
        return;
      case EventType::kStored:
        deliver_stored(sink);
        return;
      case EventType::kRemoved:
        deliver_removed(sink);
        return;
    }
  }

  bool in_gpu_memory() {
    const bool gpu = (event_.medium.empty() || event_.medium == "GPU") && event_.locality != "REMOTE";
    if (!gpu) ++counts_.skipped_medium;
    return gpu;
  }

  void deliver_stored(KvEventSink& sink) {
    if (!in_gpu_memory() || !in_attention_group()) return;
    if (!event_.has_hashes || event_.block_size == 0) {
      ++counts_.skipped_invalid;
      return;
    }
    if (event_.block_size != block_size_) {
      ++counts_.skipped_block_size;
      mismatched_block_size_ = event_.block_size;
      return;
    }
    if (event_.tokens.size() % block_size_ != 0 || event_.tokens.size() / block_size_ != event_.hashes.size() ||
        !hash_event()) {
      ++counts_.skipped_invalid;
      return;
    }
    counts_.stored_blocks += blocks_.size();
    if (!blocks_.empty()) sink.on_stored(event_.parent, blocks_);
  }

  // From the event's tokens and keys to blocks_; false when its extra keys do not fit.
  bool hash_event() {
    // Releases before lora_name know an adapter by its number only.
    const NamespaceHash base = !event_.lora_name.empty() ? lora_namespace(event_.lora_name)
                               : event_.lora_id          ? lora_namespace(std::to_string(*event_.lora_id))
                                                         : 0;
    std::size_t entries = 0;
    if (event_.extra_keys && (!event_.extra_keys->read_array(entries) || entries != event_.hashes.size())) return false;
    blocks_.resize(event_.hashes.size());
    const std::span<const TokenId> tokens = event_.tokens;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      NamespaceHash ns = base;
      if (event_.extra_keys && !read_block_namespace(*event_.extra_keys, event_.lora_name, base, ns)) return false;
      blocks_[i] = {hash_block(tokens.subspan(i * block_size_, block_size_), ns), event_.hashes[i]};
    }
    return true;
  }

  void deliver_removed(KvEventSink& sink) {
    if (!in_gpu_memory()) return;
    if (!event_.has_hashes) {
      ++counts_.skipped_invalid;
      return;
    }
    // A removal does not say its group's kind: it concerns us if that group has stored attention blocks.
    if (event_.group_idx && !(attention_groups_ & group_bit(*event_.group_idx))) {
      ++counts_.skipped_group;
      return;
    }
    counts_.removed_blocks += event_.hashes.size();
    if (!event_.hashes.empty()) sink.on_removed(event_.hashes);
  }

  bool in_attention_group() {
    const std::string_view kind = event_.spec_kind;
    const bool attention = kind.empty() || kind == "full_attention" || kind == "mla_attention";
    const bool known_group = !event_.group_idx || group_bit(*event_.group_idx) != 0;
    if (!attention || !known_group) {
      ++counts_.skipped_group;
      return false;
    }
    if (event_.group_idx) attention_groups_ |= group_bit(*event_.group_idx);
    return true;
  }

  // Groups beyond 63 do not exist in practice; they get no bit and are left out.
  static std::uint64_t group_bit(std::int64_t group) {
    return group >= 0 && group < 64 ? std::uint64_t{1} << group : 0;
  }

  std::size_t block_size_;
  std::size_t mismatched_block_size_ = 0;
  std::uint64_t attention_groups_ = 0;
  KvEventCounts counts_;
  RawEvent event_;
  std::vector<StoredBlock> blocks_;
};

KvEventDecoder::KvEventDecoder(std::size_t block_size) : impl_(std::make_unique<Impl>(block_size)) {}
KvEventDecoder::~KvEventDecoder() = default;
KvEventDecoder::KvEventDecoder(KvEventDecoder&&) noexcept = default;
KvEventDecoder& KvEventDecoder::operator=(KvEventDecoder&&) noexcept = default;

DecodeResult KvEventDecoder::decode(std::span<const std::byte> payload, KvEventSink& sink) {
  return impl_->decode(payload, sink);
}
const KvEventCounts& KvEventDecoder::counts() const {
  return impl_->counts();
}
std::size_t KvEventDecoder::mismatched_block_size() const {
  return impl_->mismatched_block_size();
}
void KvEventDecoder::reset() {
  impl_->reset();
}

}  // namespace kvrouter
