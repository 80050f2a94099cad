#include "sim/event_publisher.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string_view>

#include "events/msgpack_writer.h"

namespace kvrouter::sim {
namespace {

constexpr std::string_view kMedium = "GPU";  // what vLLM says on any device, CPUs included
constexpr std::string_view kSpecKind = "full_attention";

std::array<char, 8> big_endian(std::uint64_t value) {
  std::array<char, 8> bytes;
  for (int i = 7; i >= 0; --i, value >>= 8) bytes[static_cast<std::size_t>(i)] = static_cast<char>(value);
  return bytes;
}

class BatchWriter {
 public:
  BatchWriter(const KvEvents& events, std::int32_t block_size, const EventPublisherOptions& options, std::string& out)
      : events_(events), block_size_(static_cast<std::size_t>(block_size)), options_(options), out_(out) {}

  void batch(double timestamp) {
    out_.array(3);
    out_.float64(timestamp);
    out_.array(events_.events.size());
    for (const KvEvent& event : events_.events) {
      switch (event.kind) {
        case KvEvent::Kind::kStored:
          stored(event);
          break;
        case KvEvent::Kind::kRemoved:
          removed(event);
          break;
        case KvEvent::Kind::kCleared:
          begin("AllBlocksCleared", 0);
          break;
      }
    }
    out_.uint(0);  // the data-parallel rank
  }

 private:
  void stored(const KvEvent& event) {
    begin("BlockStored", 10);
    hashes(event);
    key("parent_block_hash");
    if (event.has_parent) {
      hash(event.parent);
    } else {
      out_.nil();
    }
    key("token_ids");
    const std::size_t num_tokens = event.num_hashes * block_size_;
    out_.array(num_tokens);
    for (std::size_t i = 0; i < num_tokens; ++i) out_.uint(events_.tokens[event.first_token + i]);
    key("block_size");
    out_.uint(block_size_);
    key("lora_id");
    out_.nil();
    key("medium");
    out_.str(kMedium);
    key("lora_name");
    out_.nil();
    key("extra_keys");
    out_.array(event.num_hashes);
    for (std::size_t i = 0; i < event.num_hashes; ++i) out_.nil();
    key("group_idx");
    out_.uint(0);
    key("kv_cache_spec_kind");
    out_.str(kSpecKind);
  }

  void removed(const KvEvent& event) {
    begin("BlockRemoved", 3);
    hashes(event);
    key("medium");
    out_.str(kMedium);
    key("group_idx");
    out_.uint(0);
  }

  void begin(std::string_view type, std::size_t num_fields) {
    if (options_.array_layout) {
      out_.array(num_fields + 1);
    } else {
      out_.map(num_fields + 1);
      out_.str("type");
    }
    out_.str(type);
  }

  void key(std::string_view name) {
    if (!options_.array_layout) out_.str(name);
  }

  void hashes(const KvEvent& event) {
    key("block_hashes");
    out_.array(event.num_hashes);
    for (std::size_t i = 0; i < event.num_hashes; ++i) hash(events_.hashes[event.first_hash + i]);
  }

  // The integer form is the last 8 bytes of the byte form, as in vLLM.
  void hash(BlockHash value) {
    if (!options_.byte_hashes) return out_.uint(value);
    std::array<char, 32> bytes;
    for (std::size_t i = 0; i < 4; ++i) {
      const auto part = big_endian(i == 3 ? value : XXH3_64bits_withSeed(&value, sizeof(value), i + 1));
      std::copy(part.begin(), part.end(), bytes.begin() + 8 * static_cast<std::ptrdiff_t>(i));
    }
    out_.bin({bytes.data(), bytes.size()});
  }

  const KvEvents& events_;
  std::size_t block_size_;
  const EventPublisherOptions& options_;
  MsgpackWriter out_;
};

zmq::const_buffer bytes_of(std::string_view text) {
  return zmq::buffer(text.data(), text.size());
}

}  // namespace

std::string encode_batch(const KvEvents& events, std::int32_t block_size, double timestamp,
                         const EventPublisherOptions& options) {
  std::string payload;
  payload.reserve(64 + 160 * events.events.size() + 34 * events.hashes.size() + 5 * events.tokens.size());
  BatchWriter(events, block_size, options, payload).batch(timestamp);
  return payload;
}

std::string bind_socket(zmq::socket_t& socket, const std::string& endpoint, const std::string& option) {
  try {
    socket.bind(endpoint);
  } catch (const zmq::error_t& error) {
    throw std::runtime_error(option + ": cannot bind " + endpoint + ": " + error.what());
  }
  return socket.get(zmq::sockopt::last_endpoint);
}

EventPublisher::EventPublisher(zmq::context_t& context, const EventPublisherOptions& options, std::int32_t block_size)
    : options_(options), block_size_(block_size) {
  if (!options.endpoint.empty()) {
    pub_ = zmq::socket_t(context, zmq::socket_type::pub);
    pub_.set(zmq::sockopt::linger, 0);
    pub_.set(zmq::sockopt::sndhwm, 100'000);
    endpoint_ = bind_socket(pub_, options.endpoint, "kv_events_endpoint");
  }
  if (!options.replay_endpoint.empty()) {
    if (options.endpoint.empty()) {
      throw std::invalid_argument("replay_endpoint is given without kv_events_endpoint: there is nothing to replay");
    }
    replay_ = zmq::socket_t(context, zmq::socket_type::router);
    replay_.set(zmq::sockopt::linger, 0);
    // One whole replay has to fit: a ROUTER drops what is over the mark.
    replay_.set(zmq::sockopt::sndhwm, static_cast<int>(options.replay_buffer) + 16);
    replay_endpoint_ = bind_socket(replay_, options.replay_endpoint, "replay_endpoint");
  }
}

void EventPublisher::publish(const KvEvents& events, double timestamp) {
  if (!enabled()) return;
  std::string payload = encode_batch(events, block_size_, timestamp, options_);
  const auto sequence = big_endian(next_sequence_++);
  pub_.send(bytes_of(options_.topic), zmq::send_flags::sndmore);
  pub_.send(bytes_of({sequence.data(), sequence.size()}), zmq::send_flags::sndmore);
  pub_.send(bytes_of(payload), zmq::send_flags::none);
  if (replay_endpoint_.empty() || options_.replay_buffer == 0) return;
  if (buffer_.size() >= options_.replay_buffer) buffer_.pop_front();
  buffer_.push_back(std::move(payload));
}

void EventPublisher::serve_replay() {
  if (replay_endpoint_.empty()) return;
  zmq::message_t frame;
  while (replay_.recv(frame, zmq::recv_flags::dontwait)) {
    zmq::message_t client = std::move(frame);
    bool more = client.more();
    std::size_t num_frames = 1;
    std::uint64_t start = 0;
    bool valid = true;
    while (more) {
      zmq::message_t part;
      if (!replay_.recv(part, zmq::recv_flags::none)) break;
      more = part.more();
      ++num_frames;
      if (num_frames == 2) valid = valid && part.size() == 0;
      if (num_frames == 3) {
        valid = valid && part.size() == 8;
        const auto* bytes = part.data<unsigned char>();
        for (std::size_t i = 0; valid && i < 8; ++i) start = start << 8 | bytes[i];
      }
    }
    if (valid && num_frames == 3) replay_from(client, start);
    frame = zmq::message_t();
  }
}

void EventPublisher::replay_from(zmq::message_t& client, std::uint64_t start) {
  const auto answer = [&](std::string_view topic, std::uint64_t sequence, std::string_view payload) {
    const auto bytes = big_endian(sequence);
    replay_.send(zmq::buffer(client.data(), client.size()), zmq::send_flags::sndmore);
    replay_.send(bytes_of({}), zmq::send_flags::sndmore);
    replay_.send(bytes_of(topic), zmq::send_flags::sndmore);
    replay_.send(bytes_of({bytes.data(), bytes.size()}), zmq::send_flags::sndmore);
    replay_.send(bytes_of(payload), zmq::send_flags::none);
  };
  const std::uint64_t oldest = next_sequence_ - buffer_.size();
  for (std::uint64_t sequence = std::max(start, oldest); sequence < next_sequence_; ++sequence) {
    answer(options_.topic, sequence, buffer_[sequence - oldest]);
  }
  answer({}, UINT64_MAX, {});
}

}  // namespace kvrouter::sim
