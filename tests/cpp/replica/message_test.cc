#include "replica/message.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <limits>

#include "kvrouter/router.h"

namespace kvrouter {
namespace {

using Kind = PeerEvent::Kind;

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

PeerRequest any_request(std::size_t num_workers) {
  PeerRequest request;
  request.ticket = *rc::gen::arbitrary<Ticket>();
  request.worker = *rc::gen::inRange<std::uint32_t>(0, static_cast<std::uint32_t>(num_workers));
  request.num_tokens = *rc::gen::inRange<std::uint64_t>(1, 100'000);
  request.miss_tokens = *rc::gen::inRange<std::uint64_t>(0, request.num_tokens + 1);
  request.prompt = *rc::gen::arbitrary<std::uint64_t>();
  return request;
}

// Names are views of the static strings.
PeerMessage any_message() {
  static const std::vector<std::string> kNames = {"http://a:1", "http://b:2#3", "tcp://[::1]:5557"};
  PeerMessage message;
  message.incarnation = *rc::gen::arbitrary<std::uint64_t>();
  message.sequence = *rc::gen::arbitrary<std::uint64_t>();
  message.block_size = *rc::gen::arbitrary<std::uint64_t>();
  message.workers.assign(kNames.begin(), kNames.end());
  const auto count = *rc::gen::inRange(0, 8);
  for (int i = 0; i < count; ++i) {
    PeerEvent event;
    event.kind = static_cast<Kind>(*rc::gen::inRange(0, 5));
    switch (event.kind) {
      case Kind::kRouted: {
        event.request = any_request(kNames.size());
        const auto prefixes = *rc::gen::arbitrary<std::vector<PrefixHash>>();
        event.begin = message.prefixes.size();
        event.count = prefixes.size();
        message.prefixes.insert(message.prefixes.end(), prefixes.begin(), prefixes.end());
        break;
      }
      case Kind::kFirstToken:
        event.request.ticket = *rc::gen::arbitrary<Ticket>();
        break;
      case Kind::kComplete:
        event.request.ticket = *rc::gen::arbitrary<Ticket>();
        event.completion = {*rc::gen::inRange<std::int64_t>(-1, 5000), *rc::gen::inRange(0, 1000) / 8.0};
        break;
      case Kind::kState: {
        event.slots_begin = *rc::gen::inRange<std::uint64_t>(0, 100);
        event.begin = message.requests.size();
        std::uint64_t slot = event.slots_begin;
        event.count = static_cast<std::size_t>(*rc::gen::inRange(0, 5));
        for (std::size_t r = 0; r < event.count; ++r, ++slot) {
          PeerRequest request = any_request(kNames.size());
          request.ticket = (request.ticket & ~0xffffffffull) | slot;
          request.prefilled = *rc::gen::arbitrary<bool>();
          message.requests.push_back(request);
        }
        event.slots_end = slot + 1;
        break;
      }
      case Kind::kBye:
        break;
    }
    message.events.push_back(event);
  }
  return message;
}

bool same(const PeerRequest& a, const PeerRequest& b) {
  return a.ticket == b.ticket && a.worker == b.worker && a.num_tokens == b.num_tokens &&
         a.miss_tokens == b.miss_tokens && a.prompt == b.prompt && a.prefilled == b.prefilled;
}

RC_GTEST_PROP(PeerMessage, WhatIsWrittenIsRead, ()) {
  const PeerMessage sent = any_message();
  std::string bytes;
  encode(sent, bytes);
  PeerMessage read;
  RC_ASSERT(decode(bytes_of(bytes), read));
  RC_ASSERT(read.incarnation == sent.incarnation && read.sequence == sent.sequence);
  RC_ASSERT(read.block_size == sent.block_size && read.workers == sent.workers);
  RC_ASSERT(read.prefixes == sent.prefixes);
  RC_ASSERT(read.events.size() == sent.events.size() && read.requests.size() == sent.requests.size());
  for (std::size_t i = 0; i < sent.requests.size(); ++i) RC_ASSERT(same(read.requests[i], sent.requests[i]));
  for (std::size_t i = 0; i < sent.events.size(); ++i) {
    const PeerEvent &a = sent.events[i], &b = read.events[i];
    RC_ASSERT(a.kind == b.kind && same(a.request, b.request) && a.begin == b.begin && a.count == b.count);
    RC_ASSERT(a.slots_begin == b.slots_begin && a.slots_end == b.slots_end);
    RC_ASSERT(a.completion.output_tokens == b.completion.output_tokens);
    RC_ASSERT(a.completion.first_token_s == b.completion.first_token_s);
  }
}

// Whatever a stranger sends: either it is refused, or all of it is in range.
RC_GTEST_PROP(PeerMessage, ChangedBytesAreRefusedOrInRange, ()) {
  std::string bytes;
  encode(any_message(), bytes);
  const auto changes = *rc::gen::inRange(1, 4);
  for (int i = 0; i < changes && !bytes.empty(); ++i) {
    const auto at = *rc::gen::inRange<std::size_t>(0, bytes.size());
    if (*rc::gen::arbitrary<bool>()) {
      bytes[at] = *rc::gen::arbitrary<char>();
    } else {
      bytes.resize(at);
    }
  }
  PeerMessage read;
  if (!decode(bytes_of(bytes), read)) return;
  for (const PeerEvent& event : read.events) {
    if (event.kind == Kind::kRouted) {
      RC_ASSERT(event.request.worker < read.workers.size());
      RC_ASSERT(event.request.miss_tokens <= event.request.num_tokens);
      RC_ASSERT(event.begin + event.count <= read.prefixes.size());
    } else if (event.kind == Kind::kState) {
      RC_ASSERT(event.begin + event.count <= read.requests.size());
    } else if (event.kind == Kind::kComplete) {
      RC_ASSERT(event.completion.first_token_s >= 0 && event.completion.output_tokens >= -1);
    }
  }
}

TEST(PeerMessage, TruncatedAtAnyByteIsRefused) {
  PeerMessage message;
  message.workers = {"http://a:1"};
  PeerEvent& event = message.events.emplace_back();
  event.kind = Kind::kRouted;
  event.request = {.ticket = 7, .num_tokens = 100, .miss_tokens = 40, .prompt = 5};
  event.count = 2;
  message.prefixes = {1, 2};
  std::string bytes;
  encode(message, bytes);
  PeerMessage read;
  ASSERT_TRUE(decode(bytes_of(bytes), read));
  for (std::size_t size = 0; size < bytes.size(); ++size) EXPECT_FALSE(decode(bytes_of(bytes.substr(0, size)), read));
  EXPECT_FALSE(decode(bytes_of(bytes + '\0'), read));
  bytes[1] = 2;  // a version to come
  EXPECT_FALSE(decode(bytes_of(bytes), read));
}

TEST(PeerMessage, NumbersOutOfRangeAreCutWhenSentAndRefusedWhenRead) {
  PeerMessage message;
  message.workers = {"http://a:1"};
  PeerEvent& routed = message.events.emplace_back();
  routed.kind = Kind::kRouted;
  routed.request = {.ticket = 7, .num_tokens = ~0ull, .miss_tokens = ~0ull};
  PeerEvent& complete = message.events.emplace_back();
  complete.kind = Kind::kComplete;
  complete.completion = {std::numeric_limits<std::int64_t>::min(), std::numeric_limits<double>::quiet_NaN()};
  std::string bytes;
  encode(message, bytes);
  PeerMessage read;
  ASSERT_TRUE(decode(bytes_of(bytes), read));
  EXPECT_EQ(read.events[0].request.num_tokens, peer_limits::kTokens);
  EXPECT_EQ(read.events[1].completion.output_tokens, -1);
  EXPECT_EQ(read.events[1].completion.first_token_s, 0);
  // The eight bytes of the seconds stand last.
  const std::string nan("\x7f\xf8\0\0\0\0\0\0", 8), infinite("\x7f\xf0\0\0\0\0\0\0", 8),
      negative("\xbf\xf0\0\0\0\0\0\0", 8);
  for (const std::string& seconds : {nan, infinite, negative}) {
    EXPECT_FALSE(decode(bytes_of(bytes.substr(0, bytes.size() - 8) + seconds), read));
  }
}

TEST(PeerMessage, WorkersAreNamedByTheirAddress) {
  EXPECT_EQ(identity_of({"tcp://a:5557", "", "http://a:8000", "", 3}), "http://a:8000#3");
  EXPECT_EQ(identity_of({"tcp://a:5557", "tcp://a:5657", ""}), "tcp://a:5557");
  EXPECT_EQ(identity_of({"", "tcp://a:5657", ""}), "tcp://a:5657");
  EXPECT_EQ(identity_of({}), "");
  EXPECT_EQ(identity_of({"", "", std::string(10'000, 'x')}), "");
}

}  // namespace
}  // namespace kvrouter
