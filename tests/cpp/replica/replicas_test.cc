// Routers that are each other's replicas, on sockets.
#include "replica/replicas.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <thread>
#include <zmq.hpp>

#include "router/fake_publisher.h"

namespace kvrouter {
namespace {

using testing::eventually;
using testing::UnusedPort;

// A port that was free a moment ago.
std::string free_endpoint() {
  const UnusedPort port;
  return port.endpoint();
}

std::unique_ptr<Router> replica(const std::string& bind, std::vector<std::string> peers,
                                const char* policy = "adaptive", std::size_t block_size = 16) {
  RouterOptions options;
  options.block_size = block_size;
  options.policy = policy;
  options.workers.resize(2);
  options.replica.bind = bind;
  options.replica.peers = std::move(peers);
  options.replica.timeout = std::chrono::milliseconds(1500);
  auto router = std::make_unique<Router>(options);
  // Nobody is there; what they are called is the same for both replicas, but not their numbers.
  router->start();
  return router;
}

void name_workers(Router& router, bool swapped) {
  router.set_worker(swapped ? 1 : 0, {"", "", "http://127.0.0.1:1"});
  router.set_worker(swapped ? 0 : 1, {"", "", "http://127.0.0.1:2"});
}

struct Pair {
  explicit Pair(const char* policy = "adaptive") : at_a(free_endpoint()), at_b(free_endpoint()) {
    a = replica(at_a, {at_a, at_b}, policy);
    b = replica(at_b, {at_a, at_b}, policy);
    name_workers(*a, false);
    name_workers(*b, true);
  }
  bool meet() {
    return eventually([&] { return a->status().replica.live == 1 && b->status().replica.live == 1; });
  }
  std::string at_a, at_b;
  std::unique_ptr<Router> a, b;
};

const std::vector<LocalHash> kBlocks = {1, 2, 3, 4};

TEST(Replicas, RequestsInFlightAreKnownToBoth) {
  Pair pair;
  ASSERT_TRUE(pair.meet());
  std::vector<Ticket> tickets;
  for (int i = 0; i < 10; ++i) tickets.push_back(pair.a->choose(kBlocks, 64).ticket);
  ASSERT_TRUE(eventually([&] { return pair.b->status().account.requests == 10; }));
  EXPECT_EQ(pair.b->status().replica.requests, 10u);
  EXPECT_EQ(pair.a->status().replica.requests, 0u);
  const Choice own = pair.b->choose(kBlocks, 64);
  ASSERT_TRUE(eventually([&] { return pair.a->status().account.requests == 11; }));
  for (const Ticket ticket : tickets) EXPECT_TRUE(pair.a->complete(ticket));
  ASSERT_TRUE(eventually([&] { return pair.b->status().account.requests == 1; }));
  EXPECT_TRUE(pair.b->complete(own.ticket));
  ASSERT_TRUE(eventually([&] { return pair.a->status().account.requests == 0; }));
  EXPECT_EQ(pair.a->status().replica.peers, 1u);  // not itself
}

TEST(Replicas, PrefixOnItsWayThroughOneDrawsItsSiblingsThroughTheOther) {
  Pair pair;
  ASSERT_TRUE(pair.meet());
  std::vector<LocalHash> blocks(200);
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = 1000 + i;
  const Choice first = pair.a->choose(blocks, 200 * 16);
  pair.a->complete(first.ticket);
  ASSERT_TRUE(eventually([&] { return pair.b->status().replica.received > 0; }));
  // The workers' numbers are swapped.
  ASSERT_TRUE(eventually([&] {
    const Choice sibling = pair.b->choose(blocks, 200 * 16);
    pair.b->complete(sibling.ticket);
    return sibling.worker == 1 - first.worker;
  }));
}

TEST(Replicas, ThatHaveNotHeardOfEachOtherDecideAlike) {
  for (const char* policy : {"linear", "adaptive"}) {
    const std::string nobody = free_endpoint();
    const auto a = replica(free_endpoint(), {nobody}, policy);
    const auto b = replica(free_endpoint(), {nobody}, policy);
    name_workers(*a, false);
    name_workers(*b, true);
    std::size_t to_first = 0;
    for (LocalHash prompt = 1; prompt <= 64; ++prompt) {
      const std::vector<LocalHash> blocks = {prompt, prompt + 1};
      const Choice of_a = a->choose(blocks, 32), of_b = b->choose(blocks, 32);
      EXPECT_EQ(of_a.worker, 1 - of_b.worker) << policy << ", prompt " << prompt;
      to_first += of_a.worker == 0;
      a->complete(of_a.ticket);
      b->complete(of_b.ticket);
    }
    EXPECT_GT(to_first, 16u) << policy;
    EXPECT_LT(to_first, 48u) << policy;
  }
}

TEST(Replicas, BatchesAndPoliciesWithoutAnAccountAreToldToo) {
  Pair pair("linear");
  ASSERT_TRUE(pair.meet());
  const std::vector<BatchRequest> batch(5, {kBlocks, 64});
  std::vector<Choice> choices(batch.size());
  pair.a->choose_batch(batch, choices);
  pair.a->choose(kBlocks, 64);
  pair.a->round_robin();
  ASSERT_TRUE(eventually([&] { return pair.b->loads().get(0).waiting + pair.b->loads().get(1).waiting == 7; }));
  Pair with_account;
  ASSERT_TRUE(with_account.meet());
  with_account.a->choose_batch(batch, choices);
  ASSERT_TRUE(eventually([&] { return with_account.b->status().account.requests == 5; }));
}

TEST(Replicas, ReplicaThatJoinsLearnsWhatIsInFlight) {
  const std::string at_a = free_endpoint(), at_b = free_endpoint();
  const auto a = replica(at_a, {at_b});
  name_workers(*a, false);
  for (int i = 0; i < 3000; ++i) a->choose(kBlocks, 64);  // more than a state has room for
  const auto b = replica(at_b, {at_a});
  name_workers(*b, true);
  EXPECT_TRUE(eventually([&] { return b->status().account.requests == 3000; }));
}

TEST(Replicas, ReplicaThatLeavesOrFallsSilent_TakesItsRequestsAlong) {
  Pair pair;
  ASSERT_TRUE(pair.meet());
  for (int i = 0; i < 5; ++i) pair.a->choose(kBlocks, 64);
  ASSERT_TRUE(eventually([&] { return pair.b->status().account.requests == 5; }));
  pair.a->stop();
  EXPECT_TRUE(eventually([&] { return pair.b->status().account.requests == 0; }));
  EXPECT_EQ(pair.b->status().replica.losses, 0u);  // it said so
  pair.a->start();
  EXPECT_TRUE(eventually([&] { return pair.b->status().account.requests == 5; }));

  // One that dies says nothing.
  zmq::context_t zmq;
  zmq::socket_t silent(zmq, zmq::socket_type::pub);
  silent.set(zmq::sockopt::linger, 0);
  silent.bind("tcp://127.0.0.1:*");
  const auto c = replica("", {silent.get(zmq::sockopt::last_endpoint)});
  name_workers(*c, false);
  PeerMessage message;
  message.incarnation = 77;
  message.block_size = 16;
  message.workers = {"http://127.0.0.1:1"};
  PeerEvent& event = message.events.emplace_back();
  event.kind = PeerEvent::Kind::kRouted;
  event.request = {.ticket = 1, .num_tokens = 10, .miss_tokens = 10};
  std::string bytes;
  ASSERT_TRUE(eventually([&] {
    ++message.sequence;
    encode(message, bytes);
    silent.send(zmq::buffer(bytes), zmq::send_flags::none);
    return c->status().account.requests == 1;
  }));
  EXPECT_TRUE(eventually([&] { return c->status().replica.losses == 1; }));
  EXPECT_EQ(c->status().account.requests, 0u);
}

TEST(Replicas, StrangersBytesAreCountedAndHarmNothing) {
  zmq::context_t zmq;
  zmq::socket_t stranger(zmq, zmq::socket_type::pub);
  stranger.set(zmq::sockopt::linger, 0);
  stranger.bind("tcp://127.0.0.1:*");
  const auto router = replica("", {stranger.get(zmq::sockopt::last_endpoint)});
  ASSERT_TRUE(eventually([&] {
    stranger.send(zmq::str_buffer("kv"), zmq::send_flags::sndmore);
    stranger.send(zmq::str_buffer("\xff\xff"), zmq::send_flags::none);
    stranger.send(zmq::buffer(std::string(1 << 16, '\x91')), zmq::send_flags::none);
    return router->status().replica.malformed > 3;
  }));
  EXPECT_EQ(router->status().replica.live, 0u);
}

TEST(Replicas, AddressThatIsTaken_IsSaid) {
  const std::string at = free_endpoint();
  const auto first = replica(at, {});
  RouterOptions options;
  options.workers.resize(1);
  options.replica.bind = at;
  Router second(options);
  EXPECT_THROW(second.start(), std::runtime_error);
  EXPECT_FALSE(second.running());
  options.replica = {.bind = {}, .peers = {"nonsense"}};
  Router third(options);
  EXPECT_THROW(third.start(), std::runtime_error);
  options.replica = {.bind = at, .peers = {}, .timeout = std::chrono::milliseconds(1)};
  EXPECT_THROW(Router{options}, std::invalid_argument);
}

}  // namespace
}  // namespace kvrouter
