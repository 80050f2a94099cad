#include "replica/peer_book.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "router/replica_host.h"

namespace kvrouter {
namespace {

using Kind = PeerEvent::Kind;
using Outcome = PeerBook::Outcome;

constexpr std::size_t kBlockSize = 16;
constexpr std::size_t kWorkers = 3;

// A replica: an account of its own, and what it tells.
class Replica {
 public:
  explicit Replica(std::uint64_t incarnation) : incarnation_(incarnation) {}

  std::string message(const std::vector<PeerEvent>& events, const std::vector<PrefixHash>& prefixes = {},
                      const std::vector<PeerRequest>& requests = {}) {
    PeerMessage message;
    message.incarnation = incarnation_;
    message.sequence = sequence_++;
    message.block_size = kBlockSize;
    for (const std::string& name : names_) message.workers.push_back(name);
    message.events = events;
    message.prefixes = prefixes;
    message.requests = requests;
    std::string bytes;
    encode(message, bytes);
    return bytes;
  }

  std::string routed(const PeerRequest& request, const std::vector<PrefixHash>& prefixes = {}) {
    PeerEvent event;
    event.kind = Kind::kRouted;
    event.request = request;
    event.count = prefixes.size();
    return message({event}, prefixes);
  }
  std::string first_token(Ticket ticket) {
    PeerEvent event;
    event.kind = Kind::kFirstToken;
    event.request.ticket = ticket;
    return message({event});
  }
  std::string complete(Ticket ticket) {
    PeerEvent event;
    event.kind = Kind::kComplete;
    event.request.ticket = ticket;
    return message({event});
  }
  std::string state(const std::vector<PeerRequest>& requests, std::uint64_t begin = 0,
                    std::uint64_t end = std::uint64_t{1} << 32) {
    PeerEvent event;
    event.kind = Kind::kState;
    event.slots_begin = begin;
    event.slots_end = end;
    event.count = requests.size();
    return message({event}, {}, requests);
  }
  std::string bye() { return message({PeerEvent{}}); }

 private:
  std::uint64_t incarnation_;
  std::uint64_t sequence_ = 0;
  std::vector<std::string> names_ = {"http://w:0", "http://w:1", "http://w:2", "http://unknown:9"};
};

// The account of the router under test, at a time that stands still.
struct Host {
  std::vector<WorkerEndpoints> endpoints{{"", "", "http://w:0"}, {"", "", "http://w:1"}, {"", "", "http://w:2"}};
  LoadTable loads{kWorkers};
  PrefixIndex index{kWorkers};
  Notices notices;
  Account account{kWorkers, kBlockSize, [] { return 100.0; }};
  RouterReplicaHost host{endpoints, &account, loads, notices};
  PeerBook book{1, kBlockSize, host};

  Outcome hear(const std::string& bytes) {
    return book.on_message({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()});
  }
  std::vector<WorkerView> rows(std::span<const PrefixHash> prefixes = {}) {
    std::vector<WorkerView> rows(kWorkers);
    const auto lock = account.lock();
    account.describe(loads, index, prefixes, rows);
    return rows;
  }
  Ticket send_own(WorkerId worker, std::size_t num_tokens) {
    const auto lock = account.lock();
    return account.enter({num_tokens, kBlockSize}, worker, 0);
  }
};

Ticket ticket(std::uint32_t slot, std::uint64_t generation = 1) {
  return generation << 32 | slot;
}

TEST(PeerBook, WhatAPeerSendsCountsAsIfItWereOurOwn) {
  Host here;
  Replica peer(2);
  const std::vector<PrefixHash> prefixes = {11, 12, 13};
  EXPECT_EQ(here.hear(peer.routed({ticket(0), 1, 100, 60, 13}, prefixes)), Outcome::kApplied);
  auto rows = here.rows(prefixes);
  EXPECT_EQ(rows[1].in_flight, 1);
  EXPECT_EQ(rows[1].prefill_tokens, 60);
  EXPECT_EQ(rows[1].context_tokens, 100);
  EXPECT_EQ(rows[1].expected_blocks, 3u);
  EXPECT_EQ(rows[0].expected_blocks, 0u);
  EXPECT_EQ(here.loads.get(1).waiting, 1);
  here.hear(peer.first_token(ticket(0)));
  EXPECT_EQ(here.rows()[1].prefill_tokens, 0);
  EXPECT_EQ(here.rows()[1].in_flight, 1);
  here.hear(peer.complete(ticket(0)));
  EXPECT_EQ(here.rows()[1].in_flight, 0);
  EXPECT_EQ(here.rows(prefixes)[1].expected_blocks, 3u);  // it is still on its way into the cache
  EXPECT_EQ(here.book.size(), 0u);
}

TEST(PeerBook, LostPeer_TakesExactlyItsOwnAlong) {
  Host here;
  Replica peer(2);
  here.send_own(1, 500);
  here.hear(peer.routed({ticket(0), 1, 1000, 700, 0}));
  const Ticket second = here.send_own(1, 300);
  here.hear(peer.routed({ticket(1), 1, 2000, 2000, 0}));
  here.hear(peer.routed({ticket(2), 2, 50, 50, 0}));
  here.send_own(1, 200);
  EXPECT_EQ(here.rows()[1].prefill_tokens, 500 + 700 + 300 + 2000 + 200);
  here.book.forget();
  auto rows = here.rows();
  EXPECT_EQ(rows[1].in_flight, 3);
  EXPECT_EQ(rows[1].prefill_tokens, 1000);
  EXPECT_EQ(rows[1].context_tokens, 1000);
  EXPECT_EQ(rows[2].in_flight, 0);
  here.account.first_token(second);  // those behind the lost ones have moved up
  EXPECT_EQ(here.rows()[1].prefill_tokens, 200);
}

TEST(PeerBook, StateMakesGoodForLostMessages) {
  Host here;
  Replica peer(2);
  here.hear(peer.routed({ticket(0), 0, 10, 10, 0}));
  here.hear(peer.routed({ticket(1), 0, 20, 20, 0}));
  peer.complete(ticket(0));                   // lost
  peer.routed({ticket(2), 2, 40, 30, 0});     // lost
  peer.routed({ticket(0, 2), 1, 80, 80, 0});  // lost: the slot's next one
  here.hear(peer.state({{ticket(0, 2), 1, 80, 80, 0, true}, {ticket(1), 0, 20, 20, 0}, {ticket(2), 2, 40, 30, 0}}));
  auto rows = here.rows();
  EXPECT_EQ(rows[0].in_flight, 1);
  EXPECT_EQ(rows[0].prefill_tokens, 20);
  EXPECT_EQ(rows[1].in_flight, 1);
  EXPECT_EQ(rows[1].prefill_tokens, 0);  // it is prefilled
  EXPECT_EQ(rows[2].prefill_tokens, 30);
  EXPECT_EQ(here.book.counts().missed, 3u);
  here.hear(peer.state({{ticket(0, 2), 1, 80, 80, 0, true}}, 0, 1));  // of the other slots it says nothing
  EXPECT_EQ(here.book.size(), 3u);
  here.hear(peer.state({}));
  EXPECT_EQ(here.book.size(), 0u);
  for (const WorkerView& row : here.rows()) EXPECT_EQ(row.in_flight, 0);
}

TEST(PeerBook, DoubledAndLateMessagesChangeNothing) {
  Host here;
  Replica peer(2);
  const std::string routed = peer.routed({ticket(0), 1, 100, 100, 0});
  const std::string complete = peer.complete(ticket(0));
  EXPECT_EQ(here.hear(routed), Outcome::kApplied);
  EXPECT_EQ(here.hear(routed), Outcome::kIgnored);
  EXPECT_EQ(here.hear(complete), Outcome::kApplied);
  EXPECT_EQ(here.hear(routed), Outcome::kIgnored);
  EXPECT_EQ(here.rows()[1].in_flight, 0);
  EXPECT_EQ(here.book.counts().duplicates, 2u);
  EXPECT_EQ(here.loads.get(1).waiting, 1);
}

TEST(PeerBook, AnotherLifeOfAPeer_BeginsWithNothing) {
  Host here;
  Replica before(2), after(3), own(1);
  here.hear(before.routed({ticket(0), 1, 100, 100, 0}));
  EXPECT_EQ(here.hear(own.routed({ticket(0), 1, 100, 100, 0})), Outcome::kOwn);
  EXPECT_EQ(here.book.size(), 1u);
  here.hear(after.message({}));
  EXPECT_EQ(here.rows()[1].in_flight, 0);
  here.hear(after.routed({ticket(5), 1, 100, 100, 0}));
  EXPECT_EQ(here.hear(after.bye()), Outcome::kBye);
  EXPECT_EQ(here.rows()[1].in_flight, 0);
}

TEST(PeerBook, UnknownWorkersAndForeignBlockSizesAreLeftOut) {
  Host here;
  Replica peer(2);
  here.hear(peer.routed({ticket(0), 3, 100, 100, 0}));
  EXPECT_EQ(here.book.counts().unknown_workers, 1u);
  EXPECT_EQ(here.book.size(), 0u);
  EXPECT_EQ(here.hear("no message"), Outcome::kMalformed);
  PeerBook other(1, 2 * kBlockSize, here.host);
  const std::string bytes = peer.message({});
  EXPECT_EQ(other.on_message({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}),
            Outcome::kOtherBlockSize);
}

TEST(PeerBook, WorkerThatMovedToAnotherSlot_TakesItsRequestsAlongWithTheNextState) {
  Host here;
  Replica peer(2);
  here.hear(peer.routed({ticket(0), 1, 100, 100, 0}));
  here.host.set_worker(1, {});
  here.host.set_worker(2, {"", "", "http://w:1"});
  here.hear(peer.state({{ticket(0), 1, 100, 100, 0}}));
  EXPECT_EQ(here.rows()[1].in_flight, 0);
  EXPECT_EQ(here.rows()[2].in_flight, 1);
}

TEST(PeerBook, ManyRequestsOfAPeerAreBounded) {
  Host here;
  Replica peer(2);
  for (std::uint32_t slot = 0; slot < PeerBook::kMost + 10; ++slot) here.hear(peer.routed({ticket(slot), 0, 1, 1, 0}));
  EXPECT_EQ(here.book.size(), PeerBook::kMost);
  EXPECT_EQ(here.book.counts().not_entered, 10u);
}

// Any sequence of requests at a peer, told by messages any of which may be lost, and then a state: what counts here is
// what a single router with all of those requests would count; and after the peer is lost, what was there before.
RC_GTEST_PROP(PeerBook, SumsEqualThoseOfOneRouter, ()) {
  Host here, one;
  Replica peer(2);
  struct Living {
    PeerRequest request;
    Ticket at_one;
  };
  std::map<std::uint32_t, Living> living;  // by slot
  std::vector<Ticket> own;
  std::uint64_t generation = 1;
  const auto steps = *rc::gen::inRange(0, 60);
  for (int i = 0; i < steps; ++i) {
    const bool lost = *rc::gen::inRange(0, 4) == 0;
    std::string told;
    switch (*rc::gen::inRange(0, 4)) {
      case 0:
      case 1: {
        const auto slot = *rc::gen::inRange<std::uint32_t>(0, 12);
        if (living.count(slot)) continue;
        const auto tokens = *rc::gen::inRange<std::uint64_t>(1, 1000);
        const PeerRequest request{ticket(slot, ++generation), *rc::gen::inRange<std::uint32_t>(0, kWorkers), tokens,
                                  tokens, 0};
        living[slot] = {request, one.send_own(request.worker, tokens)};
        told = peer.routed(request);
        break;
      }
      case 2: {
        if (living.empty()) continue;
        const auto gone = living.begin();
        told = peer.complete(gone->second.request.ticket);
        one.account.complete(gone->second.at_one, {});
        living.erase(gone);
        break;
      }
      default: {
        const auto worker = *rc::gen::inRange<WorkerId>(0, kWorkers);
        here.send_own(worker, 77);
        own.push_back(one.send_own(worker, 77));
        continue;
      }
    }
    if (!lost) RC_ASSERT(here.hear(told) == Outcome::kApplied);
  }
  std::vector<PeerRequest> requests;
  for (const auto& [slot, request] : living) requests.push_back(request.request);
  here.hear(peer.state(requests));
  const auto same = [&] {
    const auto a = here.rows(), b = one.rows();
    for (std::size_t w = 0; w < kWorkers; ++w) {
      RC_ASSERT(a[w].in_flight == b[w].in_flight);
      RC_ASSERT(std::abs(a[w].context_tokens - b[w].context_tokens) < 1e-6);
    }
  };
  same();
  here.book.forget();
  for (const auto& [slot, request] : living) one.account.drop(std::vector<Ticket>{request.at_one});
  same();
  RC_ASSERT(here.account.status().requests == own.size());
}

}  // namespace
}  // namespace kvrouter
