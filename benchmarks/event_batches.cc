#include "event_batches.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <fstream>
#include <optional>
#include <random>
#include <stdexcept>

#include "events/msgpack_writer.h"

namespace kvrouter::bench {
namespace {

constexpr std::uint32_t kVocabulary = 150'000;
constexpr std::size_t kMaxChain = 32;

struct Worker {
  std::deque<EngineHash> cached;  // the oldest first
  std::optional<EngineHash> last;
};

class BatchMaker {
 public:
  explicit BatchMaker(const BatchOptions& options) : options_(options), workers_(options.num_workers) {}

  BatchList make() {
    BatchList list;
    list.num_workers = options_.num_workers;
    while (list.stored_blocks < options_.stored_blocks) {
      const auto worker = static_cast<WorkerId>(list.batches.size() % options_.num_workers);
      list.batches.push_back({worker, batch(workers_[worker], list)});
    }
    return list;
  }

 private:
  std::string batch(Worker& worker, BatchList& list) {
    const std::size_t blocks = std::uniform_int_distribution<std::size_t>(1, kMaxChain)(random_);
    const bool evicts = options_.capacity > 0 && worker.cached.size() + blocks > options_.capacity;
    std::string out;
    MsgpackWriter writer(out);
    writer.array(3);
    writer.float64(1.7e9 + static_cast<double>(list.batches.size()) * 1e-3);
    writer.array(evicts ? 2 : 1);
    if (evicts) {
      list.removed_blocks += blocks;
      write_removed(writer, worker, blocks);
    }
    list.stored_blocks += blocks;
    write_stored(writer, worker, blocks);
    writer.uint(0);
    return out;
  }

  void write_key(MsgpackWriter& writer, const char* key) {
    if (options_.layout == Layout::kMap) writer.str(key);
  }

  void write_removed(MsgpackWriter& writer, Worker& worker, std::size_t blocks) {
    options_.layout == Layout::kMap ? writer.map(4) : writer.array(3);
    write_key(writer, "type");
    writer.str("BlockRemoved");
    write_key(writer, "block_hashes");
    writer.array(blocks);
    for (std::size_t i = 0; i < blocks; ++i) {
      writer.uint(worker.cached.front());
      if (worker.last == worker.cached.front()) worker.last.reset();
      worker.cached.pop_front();
    }
    write_key(writer, "medium");
    writer.str("GPU");
    if (options_.layout == Layout::kMap) {
      writer.str("group_idx");
      writer.uint(0);
    }
  }

  // All fields that vLLM 0.32.0 sends in maps, in its order; in arrays those of 0.16.0.
  void write_stored(MsgpackWriter& writer, Worker& worker, std::size_t blocks) {
    options_.layout == Layout::kMap ? writer.map(11) : writer.array(8);
    write_key(writer, "type");
    writer.str("BlockStored");
    std::vector<EngineHash> hashes(blocks);
    for (EngineHash& hash : hashes) hash = random_();
    write_key(writer, "block_hashes");
    writer.array(blocks);
    for (const EngineHash hash : hashes) writer.uint(hash);
    const bool goes_on = worker.last && std::bernoulli_distribution(0.5)(random_);
    write_key(writer, "parent_block_hash");
    goes_on ? writer.uint(*worker.last) : writer.nil();
    write_key(writer, "token_ids");
    writer.array(blocks * kBlockSize);
    std::uniform_int_distribution<std::uint32_t> token(0, kVocabulary - 1);
    for (std::size_t i = 0; i < blocks * kBlockSize; ++i) writer.uint(token(random_));
    write_key(writer, "block_size");
    writer.uint(kBlockSize);
    write_key(writer, "lora_id");
    writer.nil();
    write_key(writer, "medium");
    writer.str("GPU");
    write_key(writer, "lora_name");
    writer.nil();
    if (options_.layout == Layout::kMap) {
      writer.str("extra_keys");
      writer.array(blocks);
      for (std::size_t i = 0; i < blocks; ++i) writer.nil();
      writer.str("group_idx");
      writer.uint(0);
      writer.str("kv_cache_spec_kind");
      writer.str("full_attention");
    }
    worker.cached.insert(worker.cached.end(), hashes.begin(), hashes.end());
    worker.last = hashes.back();
  }

  const BatchOptions options_;
  std::mt19937_64 random_{1};
  std::vector<Worker> workers_;
};

std::uint64_t sequence_number(const std::string& frame) {
  std::uint64_t number = 0;
  for (const char byte : frame) number = number << 8 | static_cast<unsigned char>(byte);
  return number;
}

}  // namespace

std::size_t BatchList::bytes() const {
  std::size_t sum = 0;
  for (const RawBatch& batch : batches) sum += batch.payload.size();
  return sum;
}

BatchList make_batches(const BatchOptions& options) {
  if (options.num_workers == 0 || (options.capacity > 0 && options.capacity < kMaxChain)) {
    throw std::invalid_argument("make_batches: at least one worker, and room for 32 blocks in its cache");
  }
  return BatchMaker(options).make();
}

BatchList read_recording(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  const std::string data((std::istreambuf_iterator<char>(file)), {});
  std::size_t at = 0;
  const auto take = [&](std::size_t size) {
    if (size > data.size() - at) throw std::runtime_error(path + " ends in the middle of a message");
    at += size;
    return data.data() + at - size;
  };
  const auto take_u32 = [&] {
    std::uint32_t value = 0;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  };
  BatchList list;
  list.num_workers = 2;
  std::uint64_t expected = 0;  // of the first worker; what does not follow is the second's
  while (at < data.size()) {
    if (take_u32() != 3) throw std::runtime_error(path + " has a message that is not of three frames");
    std::string frames[3];
    for (std::string& frame : frames) {
      const std::uint32_t size = take_u32();
      frame.assign(take(size), size);
    }
    const bool first = sequence_number(frames[1]) == expected;
    if (first) ++expected;
    list.batches.push_back({first ? WorkerId{0} : WorkerId{1}, std::move(frames[2])});
  }
  return list;
}

}  // namespace kvrouter::bench
