#include "op_stream.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <numeric>
#include <stdexcept>

namespace kvrouter::bench {
namespace {

static_assert(std::endian::native == std::endian::little, "op streams are little endian");

constexpr char kMagic[8] = {'K', 'V', 'O', 'P', '1', 0, 0, 0};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  std::string data;
  file.seekg(0, std::ios::end);
  data.resize(static_cast<std::size_t>(file.tellg()));
  file.seekg(0);
  if (!file.read(data.data(), static_cast<std::streamsize>(data.size()))) {
    throw std::runtime_error("cannot read " + path);
  }
  return data;
}

class Reader {
 public:
  Reader(const std::string& data, const std::string& path) : data_(data), path_(path) {}

  template <typename T>
  T take() {
    T value;
    std::memcpy(&value, bytes(sizeof value), sizeof value);
    return value;
  }
  const char* bytes(std::size_t size) {
    if (size > data_.size() - at_) fail("ends in the middle of an op");
    const char* start = data_.data() + at_;
    at_ += size;
    return start;
  }
  bool at_end() const { return at_ == data_.size(); }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + " " + what + " (at byte " + std::to_string(at_) + ")");
  }

 private:
  const std::string& data_;
  const std::string& path_;
  std::size_t at_ = 0;
};

struct OpHeader {
  Op::Kind kind;
  WorkerId worker;
  std::size_t count;
  std::optional<EngineHash> parent;
  const char* payload;
};

OpHeader read_op(Reader& in, std::uint32_t num_workers) {
  OpHeader op;
  const auto kind = in.take<std::uint8_t>();
  op.worker = in.take<std::uint32_t>();
  op.count = in.take<std::uint32_t>();
  if (kind < 1 || kind > 4) in.fail("has an op of unknown kind " + std::to_string(kind));
  if (op.worker >= num_workers) in.fail("names worker " + std::to_string(op.worker) + ", which it does not have");
  op.kind = static_cast<Op::Kind>(kind);
  if (op.kind == Op::Kind::kStore) {
    const bool has_parent = in.take<std::uint8_t>() != 0;
    const auto parent = in.take<std::uint64_t>();
    if (has_parent) op.parent = parent;
  }
  const std::size_t size = op.kind == Op::Kind::kStore ? 16 : op.kind == Op::Kind::kClear ? 0 : 8;
  op.payload = in.bytes(op.count * size);
  return op;
}

template <typename T>
std::span<const T> append(std::vector<T>& to, const char* payload, std::size_t count) {
  const std::size_t start = to.size();
  to.resize(start + count);  // within the capacity reserved: spans into `to` stay valid
  std::memcpy(to.data() + start, payload, count * sizeof(T));
  return {to.data() + start, count};
}

}  // namespace

OpStream::OpStream(const std::string& path) {
  const std::string data = read_file(path);
  Reader in(data, path);
  if (data.size() < 24 || std::memcmp(in.bytes(8), kMagic, 8) != 0) {
    throw std::runtime_error(path + " is no op stream (make one with benchmarks/make_ops.py)");
  }
  block_size_ = in.take<std::uint32_t>();
  num_workers_ = in.take<std::uint32_t>();
  const auto count = in.take<std::uint64_t>();
  if (num_workers_ == 0) in.fail("has no workers");

  std::size_t num_stored = 0, num_hashes = 0, num_ops = 0;
  Reader ahead = in;
  for (; num_ops < count; ++num_ops) {
    const OpHeader op = read_op(ahead, num_workers_);
    (op.kind == Op::Kind::kStore ? num_stored : num_hashes) += op.count;
  }
  if (!ahead.at_end()) ahead.fail("goes on after its last op");
  ops_.reserve(num_ops);
  stored_.reserve(num_stored);
  hashes_.reserve(num_hashes);
  static_assert(sizeof(StoredBlock) == 16, "a stored block is laid out as the file has it");
  for (std::size_t i = 0; i < num_ops; ++i) {
    const OpHeader header = read_op(in, num_workers_);
    Op op{header.kind, header.worker, header.parent, {}, {}};
    if (op.kind == Op::Kind::kStore) {
      op.stored = append(stored_, header.payload, header.count);
    } else if (op.kind != Op::Kind::kClear) {
      op.hashes = append(hashes_, header.payload, header.count);
    }
    ops_.push_back(op);
  }
}

std::size_t OpStream::event_blocks() const {
  return std::accumulate(ops_.begin(), ops_.end(), std::size_t{0},
                         [](std::size_t sum, const Op& op) { return sum + (op.is_event() ? op.num_blocks() : 0); });
}

std::size_t OpStream::find_blocks() const {
  return std::accumulate(ops_.begin(), ops_.end(), std::size_t{0},
                         [](std::size_t sum, const Op& op) { return sum + (op.is_event() ? 0 : op.num_blocks()); });
}

std::size_t OpStream::num_finds() const {
  return static_cast<std::size_t>(std::count_if(ops_.begin(), ops_.end(), [](const Op& op) { return !op.is_event(); }));
}

void apply(PrefixIndex& index, const Op& op) {
  switch (op.kind) {
    case Op::Kind::kStore:
      return index.store(op.worker, op.parent, op.stored);
    case Op::Kind::kRemove:
      return index.remove(op.worker, op.hashes);
    case Op::Kind::kClear:
      return index.clear(op.worker);
    case Op::Kind::kFind:
      return;
  }
}

std::uint64_t add_to_checksum(std::uint64_t sum, std::span<const std::uint32_t> overlap) {
  constexpr std::uint64_t kPrime = 0x100000001b3;
  std::uint64_t hash = 0xcbf29ce484222325;
  for (std::size_t worker = 0; worker < overlap.size(); ++worker) {
    if (overlap[worker] == 0) continue;
    hash = (hash ^ worker) * kPrime;
    hash = (hash ^ overlap[worker]) * kPrime;
  }
  return std::rotl(sum, 1) ^ hash;
}

std::string checksum_text(std::uint64_t sum) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (std::size_t i = 0; i < 16; ++i) text[i] = kDigits[(sum >> (60 - 4 * i)) & 15];
  return text;
}

}  // namespace kvrouter::bench
