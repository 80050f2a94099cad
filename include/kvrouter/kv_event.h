// KV events: what a vLLM worker says about its KV cache, decoded from the wire.
//
// A worker publishes batches; a batch is MessagePack in either of two layouts (events as maps, or as arrays by
// position in older releases).  KvEventDecoder reads both, hashes the tokens of stored blocks and hands each event to
// a sink as it is decoded, without building the batch in memory first.
//
// Bytes from the wire are not trusted.  A batch whose structure is broken (truncated, wrong types where the structure
// depends on them) stops there: what was decoded before it has reached the sink, and the result says so.  An event
// that is well-formed but cannot be used (unknown type, other block size, not an attention group, not in GPU memory)
// is skipped and counted, and the rest of the batch is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/block_hash.h"

namespace kvrouter {

// The worker's own name for a cached block: an integer as it came, or a byte string folded to 64 bits.  Opaque, and
// meaningful within one worker only.
using EngineHash = std::uint64_t;

struct StoredBlock {
  LocalHash local;
  EngineHash engine;

  bool operator==(const StoredBlock&) const = default;
};

// Blocks in a row, as a worker stores them: the first follows `parent` (nothing: it starts a sequence).
struct StoredChain {
  std::optional<EngineHash> parent;
  std::vector<StoredBlock> blocks;

  bool operator==(const StoredChain&) const = default;
};

// Receives the events of one worker, in order.  The spans are valid during the call only.
class KvEventSink {
 public:
  virtual ~KvEventSink() = default;
  // A chain of blocks: the first follows `parent` (nothing: starts a sequence), each other its predecessor.
  virtual void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) = 0;
  virtual void on_removed(std::span<const EngineHash> blocks) = 0;
  virtual void on_cleared() = 0;
  // Events were lost, or could not be read: what the worker holds is not known any more.
  virtual void on_interrupted() { on_cleared(); }
  // The same, but all that was lost is about to be told again, from the beginning or from the last reset on.
  virtual void on_forgotten() { on_cleared(); }
};

struct KvEventCounts {
  std::uint64_t batches = 0;
  std::uint64_t stored_blocks = 0;
  std::uint64_t removed_blocks = 0;
  std::uint64_t cleared = 0;
  std::uint64_t namespaced_blocks = 0;  // stored ones of a LoRA adapter, a cache salt, with multimodal items
  std::uint64_t skipped_unknown_type = 0;
  std::uint64_t skipped_unknown_field = 0;  // fields, not events: the event itself was used
  std::uint64_t skipped_block_size = 0;     // events with another block size than the router's
  std::uint64_t skipped_group = 0;          // events of non-attention KV-cache groups
  std::uint64_t skipped_medium = 0;         // events about other memory than the GPU's
  std::uint64_t skipped_invalid = 0;        // events that contradict themselves or lack a field
  std::uint64_t malformed_batches = 0;
};

struct DecodeResult {
  bool ok = true;
  std::string error;  // when !ok: what was wrong and at which byte
};

// Decodes the batches of one worker.  Not safe for threads; one decoder per worker, since which KV-cache groups are
// attention groups is learnt from the worker's own events.  Steady state allocates nothing.
class KvEventDecoder {
 public:
  // REQUIRES: block_size > 0, the router's.
  explicit KvEventDecoder(std::size_t block_size);
  ~KvEventDecoder();
  KvEventDecoder(KvEventDecoder&&) noexcept;
  KvEventDecoder& operator=(KvEventDecoder&&) noexcept;

  DecodeResult decode(std::span<const std::byte> payload, KvEventSink& sink);

  const KvEventCounts& counts() const;
  // The last block size announced by the worker that differs from the router's; 0 if none did.
  std::size_t mismatched_block_size() const;
  // What was learnt about the worker's groups: one bit a group that has attention blocks.
  std::uint64_t attention_groups() const;
  void set_attention_groups(std::uint64_t groups);
  // Forgets what was learnt about the worker's groups (it restarted); the counts go on.
  void reset();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
