#include "sim/event_publisher.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace kvrouter::sim {
namespace {

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::strtoul(hex.substr(i, 2).c_str(), nullptr, 16)));
  }
  return bytes;
}

KvEvents sample() {
  KvEvents events;
  events.cleared();
  events.removed(UINT64_MAX);
  events.events.push_back({KvEvent::Kind::kStored, false, 0, events.hashes.size(), 2, events.tokens.size()});
  events.hashes.insert(events.hashes.end(), {0x0102030405060708, 9});
  events.tokens.insert(events.tokens.end(), {1, 200, 40000, 70000});
  events.events.push_back({KvEvent::Kind::kStored, true, 9, events.hashes.size(), 1, events.tokens.size()});
  events.hashes.push_back(7);
  events.tokens.insert(events.tokens.end(), {3, 4});
  return events;
}

TEST(EventPublisher, MapLayout_IsByteForByteWhatVllmEncodes) {
  // The same batch through vLLM 0.32.0's own event classes and encoder.
  const std::string expected = from_hex(
      "93cb40934a00000000009481a474797065b0416c6c426c6f636b73436c656172656484a474797065ac426c6f636b52656d6f"
      "766564ac626c6f636b5f68617368657391cfffffffffffffffffa66d656469756da3475055a967726f75705f696478008ba4"
      "74797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392cf010203040506070809b1706172656e745f626c"
      "6f636b5f68617368c0a9746f6b656e5f6964739401ccc8cd9c40ce00011170aa626c6f636b5f73697a6502a76c6f72615f69"
      "64c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797392c0c0a967726f75705f69647800b2"
      "6b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e8ba474797065ab426c6f636b53746f7265"
      "64ac626c6f636b5f6861736865739107b1706172656e745f626c6f636b5f6861736809a9746f6b656e5f696473920304aa62"
      "6c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65"
      "797391c0a967726f75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00");
  EXPECT_EQ(encode_batch(sample(), 2, 1234.5, {}), expected);
}

TEST(EventPublisher, ArrayLayout_HasTheTagFirstAndNoNames) {
  EventPublisherOptions options;
  options.array_layout = true;
  KvEvents events;
  events.cleared();
  events.removed(5);
  EXPECT_EQ(
      encode_batch(events, 2, 0, options),
      from_hex("93cb00000000000000009291b0416c6c426c6f636b73436c656172656494ac426c6f636b52656d6f7665649105a3475055"
               "0000"));
}

TEST(EventPublisher, ByteHashes_EndInTheIntegerForm) {
  EventPublisherOptions options;
  options.byte_hashes = true;
  KvEvents events;
  events.removed(0x1122334455667788);
  const std::string payload = encode_batch(events, 2, 0, options);
  const std::size_t at = payload.find(from_hex("c420"));
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(payload.substr(at + 2 + 24, 8), from_hex("1122334455667788"));
}

class Replay : public ::testing::Test {
 protected:
  static std::vector<std::string> receive(zmq::socket_t& socket) {
    std::vector<std::string> frames;
    bool more = true;
    while (more) {
      zmq::message_t frame;
      if (!socket.recv(frame)) break;  // the time limit
      frames.push_back(frame.to_string());
      more = frame.more();
    }
    return frames;
  }
  void send(zmq::socket_t& socket, const std::vector<std::string>& frames) {
    for (std::size_t i = 0; i < frames.size(); ++i) {
      socket.send(zmq::buffer(frames[i]), i + 1 < frames.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }
  // Serves until the answer has come whole.
  std::vector<std::vector<std::string>> ask(EventPublisher& publisher, zmq::socket_t& dealer, std::string start) {
    send(dealer, {"", std::move(start)});
    std::vector<std::vector<std::string>> answers;
    for (int i = 0; i < 1000; ++i) {
      publisher.serve_replay();
      while (dealer.get(zmq::sockopt::events) & ZMQ_POLLIN) {
        answers.push_back(receive(dealer));
        if (answers.back().size() == 4 && answers.back()[2] == std::string(8, '\xff')) return answers;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return answers;
  }
  static std::string sequence(std::uint8_t value) { return std::string(7, '\0') + static_cast<char>(value); }

  EventPublisherOptions options() {
    EventPublisherOptions result;
    result.endpoint = result.replay_endpoint = "tcp://127.0.0.1:*";
    result.replay_buffer = 3;
    return result;
  }

  zmq::context_t context_;
};

TEST_F(Replay, AnswersFromTheSequenceAskedFor_AsFarAsTheBufferGoes) {
  EventPublisher publisher(context_, options(), 2);
  zmq::socket_t dealer(context_, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.connect(publisher.replay_endpoint());
  for (int i = 0; i < 5; ++i) publisher.publish(sample(), i);

  auto answers = ask(publisher, dealer, sequence(3));
  ASSERT_EQ(answers.size(), 3U);
  EXPECT_EQ(answers[0], (std::vector<std::string>{"", "kv", sequence(3), encode_batch(sample(), 2, 3, {})}));
  EXPECT_EQ(answers[1][2], sequence(4));
  EXPECT_EQ(answers[2], (std::vector<std::string>{"", "", std::string(8, '\xff'), ""}));

  answers = ask(publisher, dealer, sequence(0));  // batches 0 and 1 are gone
  ASSERT_EQ(answers.size(), 4U);
  EXPECT_EQ(answers[0][2], sequence(2));
  answers = ask(publisher, dealer, sequence(9));
  EXPECT_EQ(answers.size(), 1U);
}

TEST_F(Replay, MalformedRequests_AreIgnored) {
  EventPublisher publisher(context_, options(), 2);
  publisher.publish(sample(), 0);
  zmq::socket_t dealer(context_, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.connect(publisher.replay_endpoint());
  send(dealer, {""});
  send(dealer, {"", "short"});
  send(dealer, {"x", sequence(0)});
  send(dealer, {"", sequence(0), "more", "and more"});
  const auto answers = ask(publisher, dealer, sequence(0));
  EXPECT_EQ(answers.size(), 2U);
}

TEST_F(Replay, EndpointTaken_IsToldWithTheOptionsName) {
  EventPublisher publisher(context_, options(), 2);
  EventPublisherOptions same = options();
  same.endpoint = publisher.endpoint();
  try {
    EventPublisher second(context_, same, 2);
    FAIL() << "two publishers on one endpoint";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()).rfind("kv_events_endpoint: cannot bind " + same.endpoint, 0), 0U);
  }
}

}  // namespace
}  // namespace kvrouter::sim
