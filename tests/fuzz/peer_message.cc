// Messages of one peer, from the wire to the account.
//
// Input: messages, each two bytes of length (little endian) and the message.  So that fuzzing is not all about sequence
// numbers, a message that can be read is sent as the next one of a peer of which nothing is lost.
#include <array>
#include <string>

#include "fuzz.h"
#include "router/replica_host.h"

namespace kvrouter::fuzz {
namespace {

constexpr std::size_t kBlockSize = 16;
constexpr std::uint64_t kOwn = 1, kPeer = 2;

std::span<const std::byte> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

}  // namespace

void fuzz_one(std::string_view input) {
  Reader in(input);
  const std::vector<WorkerEndpoints> workers = {{"", "", "http://a:1"}, {"", "", "http://b:2"}};
  LoadTable loads(2);
  PrefixIndex index(2);
  Notices notices;
  Account account(2, kBlockSize, [] { return 100.0; });
  RouterReplicaHost host(workers, &account, loads, notices);
  PeerBook book(kOwn, kBlockSize, host);
  PeerMessage message;
  std::string again;
  std::uint64_t sequence = 0;
  while (!in.empty()) {
    const std::size_t low = in.byte();
    const std::string_view bytes = in.bytes(low | std::size_t{in.byte()} << 8);
    if (!decode(bytes_of(bytes), message)) {
      FUZZ_CHECK(book.on_message(bytes_of(bytes)) == PeerBook::Outcome::kMalformed);
    } else {
      message.incarnation = kPeer;
      message.block_size = kBlockSize;
      message.sequence = ++sequence;
      encode(message, again);
      const auto outcome = book.on_message(bytes_of(again));
      FUZZ_CHECK(outcome == PeerBook::Outcome::kApplied || outcome == PeerBook::Outcome::kBye);
    }
    FUZZ_CHECK(account.status().requests == book.size());
    std::array<WorkerView, 2> rows{};
    const auto lock = account.lock();
    account.describe(loads, index, {}, rows);
    std::size_t in_flight = 0;
    for (const WorkerView& row : rows) {
      FUZZ_CHECK(row.in_flight >= 0 && row.prefill_tokens >= -1e-3 && row.context_tokens >= -1e-3);
      in_flight += static_cast<std::size_t>(row.in_flight);
    }
    FUZZ_CHECK(in_flight == book.size());
  }
  book.forget();
  FUZZ_CHECK(account.status().requests == 0);
}

}  // namespace kvrouter::fuzz
