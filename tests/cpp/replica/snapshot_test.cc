#include "replica/snapshot.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace kvrouter {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

std::string error_of(const std::string& bytes) {
  Snapshot read;
  return decode(bytes_of(bytes), read);
}

Snapshot small() {
  return {64,
          {{"http://a:1", {7, 0xdeadbeef, true, 3}, {{std::nullopt, {{1, 11}, {2, 12}}}, {12, {{3, 13}}}}},
           {"http://b:2#1", {0, 1, false, 0}, {}}}};
}

// A body that is well wrapped, whatever it holds.
std::string wrapped(const std::string& body) {
  std::string bytes = encode(Snapshot{1, {}}).substr(0, 12);
  const std::uint64_t numbers[] = {body.size(), XXH3_64bits(body.data(), body.size())};
  bytes.append(reinterpret_cast<const char*>(numbers), sizeof numbers);
  return bytes + body;
}

RC_GTEST_PROP(Snapshot, WhatIsWrittenIsRead, ()) {
  Snapshot sent{*rc::gen::inRange<std::uint64_t>(1, 1000), {}};
  const auto workers = *rc::gen::inRange(0, 4);
  for (int w = 0; w < workers; ++w) {
    WorkerSnapshot worker{"http://worker:" + std::to_string(w),
                          {*rc::gen::arbitrary<std::uint64_t>(), *rc::gen::arbitrary<std::uint64_t>(),
                           *rc::gen::arbitrary<bool>(), *rc::gen::arbitrary<std::uint64_t>()},
                          {}};
    const auto chains = *rc::gen::inRange(0, 5);
    for (int c = 0; c < chains; ++c) {
      StoredChain chain;
      if (*rc::gen::arbitrary<bool>()) chain.parent = *rc::gen::arbitrary<EngineHash>();
      const auto blocks = *rc::gen::inRange(1, 20);
      for (int b = 0; b < blocks; ++b) {
        chain.blocks.push_back({*rc::gen::arbitrary<LocalHash>(), *rc::gen::arbitrary<EngineHash>()});
      }
      worker.chains.push_back(chain);
    }
    sent.workers.push_back(worker);
  }
  Snapshot read;
  RC_ASSERT(decode(bytes_of(encode(sent)), read) == "");
  RC_ASSERT(read.block_size == sent.block_size && read.workers.size() == sent.workers.size());
  for (std::size_t w = 0; w < sent.workers.size(); ++w) {
    const WorkerSnapshot &a = sent.workers[w], &b = read.workers[w];
    RC_ASSERT(a.identity == b.identity && a.chains == b.chains && a.position.sequence == b.position.sequence);
    RC_ASSERT(a.position.digest == b.position.digest && a.position.whole == b.position.whole);
    RC_ASSERT(a.position.attention_groups == b.position.attention_groups);
  }
}

TEST(Snapshot, AnyChangedByteIsFoundOut) {
  const std::string bytes = encode(small());
  ASSERT_EQ(error_of(bytes), "");
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    std::string changed = bytes;
    changed[at] = static_cast<char>(changed[at] ^ 0x20);
    EXPECT_NE(error_of(changed), "") << at;
  }
  for (std::size_t size = 0; size < bytes.size(); ++size) EXPECT_NE(error_of(bytes.substr(0, size)), "") << size;
  EXPECT_NE(error_of(bytes + '\0'), "");
  std::string later = bytes;
  later[8] = 2;
  EXPECT_EQ(error_of(later), "it is of version 2, not 1");
}

// Whoever writes the checksum may write what he likes.
RC_GTEST_PROP(Snapshot, HostileContentIsRefusedOrInRange, ()) {
  std::string body = encode(small()).substr(28);
  const auto changes = *rc::gen::inRange(1, 4);
  for (int i = 0; i < changes; ++i) body[*rc::gen::inRange<std::size_t>(0, body.size())] = *rc::gen::arbitrary<char>();
  Snapshot read;
  if (!decode(bytes_of(wrapped(body)), read).empty()) return;
  RC_ASSERT(read.block_size > 0);
  for (const WorkerSnapshot& worker : read.workers) {
    RC_ASSERT(!worker.identity.empty());
    for (const StoredChain& chain : worker.chains) RC_ASSERT(!chain.blocks.empty());
  }
}

TEST(Snapshot, LiesAboutSizesAreRefused) {
  for (const char* body : {"\x92\x10\xdd\xff\xff\xff\xff", "\x92\x00\x90", "\x92\x10\x91\x96\xa0\x00\x00\xc2\x00\x90",
                           "\x92\x10\x91\x96\xa1x\x00\x00\xc2\x00\xdd\x7f\xff\xff\xff", "\xc1", ""}) {
    EXPECT_NE(error_of(wrapped(body)), "") << body;
  }
  Snapshot twice = small();
  twice.workers[1].identity = twice.workers[0].identity;
  EXPECT_NE(error_of(encode(twice)), "");
}

TEST(SnapshotFile, IsWholeOrAsItWasBefore) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("snapshot-" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  const std::string path = folder / "index.snapshot";
  const auto content = [&] {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  write_file_atomically(path, "first");
  EXPECT_EQ(content(), "first");
  write_file_atomically(path, "second");
  EXPECT_EQ(content(), "second");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 1);  // nothing else is left there
  struct stat status{};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0077, 0u);  // it is nobody else's business
  EXPECT_THROW(write_file_atomically(folder / "missing" / "x", "third"), std::system_error);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace kvrouter
