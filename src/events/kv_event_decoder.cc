#include <vector>

#include "events/msgpack_reader.h"
#include "events/raw_event.h"
#include "kvrouter/kv_event.h"

namespace kvrouter {

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
      if (!read_event(in, event_, counts_.skipped_unknown_field))
        return malformed(in, "truncated or malformed event " + std::to_string(i));
      deliver(sink);
    }
    return {};
  }

  const KvEventCounts& counts() const { return counts_; }
  std::size_t mismatched_block_size() const { return mismatched_block_size_; }
  void reset() { attention_groups_ = 0; }
  std::uint64_t attention_groups() const { return attention_groups_; }
  void set_attention_groups(std::uint64_t groups) { attention_groups_ = groups; }

 private:
  DecodeResult malformed(const MsgpackReader& in, std::string what) {
    ++counts_.malformed_batches;
    return {false, std::move(what) + " at byte " + std::to_string(in.position())};
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
      counts_.namespaced_blocks += ns != 0;
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
std::uint64_t KvEventDecoder::attention_groups() const {
  return impl_->attention_groups();
}
void KvEventDecoder::set_attention_groups(std::uint64_t groups) {
  impl_->set_attention_groups(groups);
}
void KvEventDecoder::reset() {
  impl_->reset();
}

}  // namespace kvrouter
