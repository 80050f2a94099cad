// What router replicas tell each other: one MessagePack array a message,
//
//   [version, incarnation, sequence, block size, [worker, ...], [event, ...]]
//
// incarnation: drawn at random when the replica starts; sequence: counts its messages from 0.  Workers are named by
// their addresses (identity_of), and events refer to them by their place in the message's list.  Events:
//
//   [0, ticket, worker, tokens, miss tokens, prompt, prefixes]    a request was sent (ticket 0: it is not tracked)
//   [1, ticket]                                                   it has got its first token
//   [2, ticket, output tokens or -1, seconds to the first token]  it has ended
//   [3, begin, end, [[ticket, worker, tokens, miss tokens, prompt, prefilled], ...]]
//                       all that the sender has in flight under tickets whose lower 32 bits are in [begin, end)
//   [4]                                                           the sender leaves
//
// A message without events is a heartbeat.  Prefixes are those that RoutedPrefixes keeps, eight bytes each, little
// endian.  A message is checked as a whole before anything of it counts: sizes, ranges, order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/policy.h"

namespace kvrouter {

struct WorkerEndpoints;

// What a worker is called between replicas: its URL, and its rank where a server has several engines; without a URL,
// where its events or its load come from.  Empty: it has no address.
std::string identity_of(const WorkerEndpoints& endpoints);

// A request as its sender accounts for it.
struct PeerRequest {
  Ticket ticket = 0;
  std::uint32_t worker = 0;  // place in the message's list of workers
  std::uint64_t num_tokens = 0;
  std::uint64_t miss_tokens = 0;
  std::uint64_t prompt = 0;
  bool prefilled = false;  // in a state only
};

struct PeerEvent {
  enum class Kind : std::uint8_t { kRouted, kFirstToken, kComplete, kState, kBye };
  Kind kind = Kind::kBye;
  PeerRequest request;               // kRouted; of the others the ticket
  std::size_t begin = 0, count = 0;  // kRouted: of PeerMessage::prefixes; kState: of PeerMessage::requests
  std::uint64_t slots_begin = 0;     // kState
  std::uint64_t slots_end = 0;       // kState: at most 2^32
  Completion completion;             // kComplete
};

struct PeerMessage {
  std::uint64_t incarnation = 0;
  std::uint64_t sequence = 0;
  std::uint64_t block_size = 0;
  std::vector<std::string_view> workers;  // when decoded: in the bytes that were decoded
  std::vector<PeerEvent> events;
  std::vector<PrefixHash> prefixes;
  std::vector<PeerRequest> requests;

  void clear();
};

namespace peer_limits {
inline constexpr std::size_t kMessageBytes = 1 << 20;
inline constexpr std::size_t kEvents = 4096;  // of a message; requests of a state, workers of a message too
inline constexpr std::size_t kIdentityBytes = 512;
inline constexpr std::size_t kPrefixes = 4096;  // of a request
inline constexpr std::uint64_t kTokens = 1'000'000'000;
}  // namespace peer_limits

// Counts and times that are out of range are cut to it.
// REQUIRES: the sizes are within peer_limits; num_tokens > 0; states are in order.
void encode(const PeerMessage& message, std::string& out);
// False, and nothing to be used of `out`, for bytes that are no such message.
bool decode(std::span<const std::byte> bytes, PeerMessage& out);

}  // namespace kvrouter
