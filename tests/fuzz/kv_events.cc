// KV event batches of one worker among two, from the wire to the index.
//
// Input: a byte for the block size, then batches: a byte for how far the sequence number moves, two for the length
// (little endian), the payload.
#include <array>
#include <vector>

#include "events/kv_event_stream.h"
#include "fuzz.h"
#include "index/index_sink.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter::fuzz {
namespace {

// Also keeps what the worker stored last, to look it up again.
class WatchingSink final : public KvEventSink {
 public:
  explicit WatchingSink(PrefixIndex& index) : index_(index) {}

  void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) override {
    FUZZ_CHECK(!blocks.empty());
    index_.store(0, parent, blocks);
    last_.clear();
    for (const StoredBlock& block : blocks) last_.push_back(block.local);
  }
  void on_removed(std::span<const EngineHash> blocks) override {
    index_.remove(0, blocks);
    last_.clear();
  }
  void on_cleared() override {
    index_.clear(0);
    last_.clear();
    FUZZ_CHECK(index_.held_blocks(0) == 0);
  }

  void check() const {
    std::array<std::uint32_t, 2> overlap{};
    index_.find_matches(last_, overlap);
    FUZZ_CHECK(overlap[0] <= last_.size());
    FUZZ_CHECK(overlap[0] <= index_.held_blocks(0));
    FUZZ_CHECK(overlap[1] == 0 && index_.held_blocks(1) == 0);
  }

 private:
  PrefixIndex& index_;
  std::vector<LocalHash> last_;
};

}  // namespace

void fuzz_one(std::string_view input) {
  constexpr std::array<std::size_t, 4> kBlockSizes = {64, 4, 1, 16};
  Reader in(input);
  PrefixIndex index(2);
  WatchingSink sink(index);
  KvEventStream stream(kBlockSizes[in.byte() % kBlockSizes.size()], sink);
  std::uint64_t sequence = 0;
  while (!in.empty()) {
    sequence += static_cast<std::uint64_t>(static_cast<std::int8_t>(in.byte()));
    const std::size_t low = in.byte();
    const std::string_view payload = in.bytes(low | std::size_t{in.byte()} << 8);
    stream.on_batch(sequence, {reinterpret_cast<const std::byte*>(payload.data()), payload.size()});
    sink.check();
  }
  stream.on_disconnected();
  FUZZ_CHECK(index.held_blocks(0) == 0);
}

}  // namespace kvrouter::fuzz
