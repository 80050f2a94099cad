#include "replica/snapshot.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "events/msgpack_reader.h"
#include "events/msgpack_writer.h"
#include "replica/message.h"

namespace kvrouter {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie in memory");
static_assert(sizeof(StoredBlock) == 16);

constexpr std::string_view kMagic = "KVRSNAP\n";
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderBytes = 8 + 4 + 8 + 8;

template <typename T>
T number_at(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

template <typename T>
void append_number(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

class Decoder {
 public:
  explicit Decoder(std::span<const std::byte> bytes) : in_(bytes) {}

  bool read(Snapshot& out) {
    std::size_t count = 0;
    if (!array_of(2) || !in_.read_uint(out.block_size) || out.block_size == 0 || !in_.read_array(count) ||
        count > Snapshot::kMaxWorkers) {
      return false;
    }
    std::set<std::string> identities;
    for (std::size_t i = 0; i < count; ++i) {
      WorkerSnapshot worker;
      if (!read_worker(worker) || !identities.insert(worker.identity).second) return false;
      out.workers.push_back(std::move(worker));
    }
    return in_.remaining() == 0;
  }

 private:
  bool array_of(std::size_t wanted) {
    std::size_t count = 0;
    return in_.read_array(count) && count == wanted;
  }

  bool read_worker(WorkerSnapshot& worker) {
    std::string_view identity;
    std::size_t chains = 0;
    if (!array_of(6) || !in_.read_string(identity) || identity.empty() ||
        identity.size() > peer_limits::kIdentityBytes || !in_.read_uint(worker.position.sequence) ||
        !in_.read_uint(worker.position.digest) || !in_.read_bool(worker.position.whole) ||
        !in_.read_uint(worker.position.attention_groups) || !in_.read_array(chains)) {
      return false;
    }
    worker.identity = identity;
    for (std::size_t i = 0; i < chains; ++i) {  // grows with what is read, not with what is announced
      StoredChain chain;
      if (!read_chain(chain)) return false;
      worker.chains.push_back(std::move(chain));
    }
    return true;
  }

  bool read_chain(StoredChain& chain) {
    if (!array_of(2)) return false;
    if (in_.peek() == MsgpackType::kNil) {
      in_.read_nil();
    } else {
      EngineHash parent = 0;
      if (!in_.read_uint(parent)) return false;
      chain.parent = parent;
    }
    std::string_view blocks;
    if (!in_.read_binary(blocks) || blocks.empty() || blocks.size() % sizeof(StoredBlock) != 0) return false;
    chain.blocks.resize(blocks.size() / sizeof(StoredBlock));
    std::memcpy(chain.blocks.data(), blocks.data(), blocks.size());
    return true;
  }

  MsgpackReader in_;
};

[[noreturn]] void fail(const std::string& what, const std::string& path) {
  throw std::system_error(errno, std::generic_category(), what + " " + path);
}

}  // namespace

std::string encode(const Snapshot& snapshot) {
  std::string body;
  MsgpackWriter writer(body);
  writer.array(2);
  writer.uint(snapshot.block_size);
  writer.array(snapshot.workers.size());
  for (const WorkerSnapshot& worker : snapshot.workers) {
    writer.array(6);
    writer.str(worker.identity);
    writer.uint(worker.position.sequence);
    writer.uint(worker.position.digest);
    writer.boolean(worker.position.whole);
    writer.uint(worker.position.attention_groups);
    writer.array(worker.chains.size());
    for (const StoredChain& chain : worker.chains) {
      writer.array(2);
      chain.parent ? writer.uint(*chain.parent) : writer.nil();
      writer.bin({reinterpret_cast<const char*>(chain.blocks.data()), chain.blocks.size() * sizeof(StoredBlock)});
    }
  }
  std::string out(kMagic);
  append_number(out, kVersion);
  append_number(out, std::uint64_t{body.size()});
  append_number(out, std::uint64_t{XXH3_64bits(body.data(), body.size())});
  return out += body;
}

std::string decode(std::span<const std::byte> bytes, Snapshot& out) {
  out = {};
  if (bytes.size() > Snapshot::kMaxBytes) return "it is larger than " + std::to_string(Snapshot::kMaxBytes) + " bytes";
  if (bytes.size() < kHeaderBytes || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return "it is no snapshot of a kvrouter";
  }
  const auto version = number_at<std::uint32_t>(bytes, 8);
  if (version != kVersion) return "it is of version " + std::to_string(version) + ", not " + std::to_string(kVersion);
  const auto body = bytes.subspan(kHeaderBytes);
  if (number_at<std::uint64_t>(bytes, 12) != body.size()) return "it is not whole";
  if (number_at<std::uint64_t>(bytes, 20) != XXH3_64bits(body.data(), body.size())) return "its checksum is wrong";
  return Decoder(body).read(out) ? "" : "its checksum is right, but what it holds is no snapshot";
}

void write_file_atomically(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp-" + std::to_string(::getpid());
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) fail("cannot create", temporary);
  const auto give_up = [&](const std::string& what) {
    const int error = errno;
    ::close(file);
    ::unlink(temporary.c_str());
    errno = error;
    fail(what, temporary);
  };
  while (!bytes.empty()) {
    const ssize_t written = ::write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) give_up("cannot write");
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  if (::fsync(file) != 0) give_up("cannot write");
  ::close(file);
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary.c_str());
    errno = error;
    fail("cannot rename to", path);
  }
  // The name is on the disk when its directory is.
  const std::size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const int folder = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) fail("cannot open", directory);
  const int synced = ::fsync(folder);
  ::close(folder);
  if (synced != 0) fail("cannot write", directory);
}

}  // namespace kvrouter
