#include "replica/message.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "events/msgpack_reader.h"
#include "events/msgpack_writer.h"
#include "kvrouter/router.h"

namespace kvrouter {
namespace {

static_assert(std::endian::native == std::endian::little, "prefixes are copied as they lie in memory");

constexpr std::uint64_t kVersion = 1;
constexpr double kMaxSeconds = 86'400;  // to a first token
constexpr std::int64_t kMaxOutput = 1'000'000'000;

using Kind = PeerEvent::Kind;

std::size_t fields_of(Kind kind) {
  switch (kind) {
    case Kind::kRouted:
      return 7;
    case Kind::kFirstToken:
      return 2;
    case Kind::kComplete:
    case Kind::kState:
      return 4;
    case Kind::kBye:
      return 1;
  }
  return 0;
}

void write_request(MsgpackWriter& out, const PeerRequest& request) {
  out.uint(request.ticket);
  out.uint(request.worker);
  out.uint(std::min(request.num_tokens, peer_limits::kTokens));
  out.uint(std::min({request.miss_tokens, request.num_tokens, peer_limits::kTokens}));
  out.uint(request.prompt);
}

class Decoder {
 public:
  Decoder(std::span<const std::byte> bytes, PeerMessage& out) : in_(bytes), out_(out) {}

  bool read() {
    std::uint64_t version = 0;
    return array_of(6) && in_.read_uint(version) && version == kVersion && in_.read_uint(out_.incarnation) &&
           in_.read_uint(out_.sequence) && in_.read_uint(out_.block_size) && read_workers() && read_events() &&
           in_.remaining() == 0;
  }

 private:
  bool array_of(std::size_t wanted) {
    std::size_t count = 0;
    return in_.read_array(count) && count == wanted;
  }

  bool read_workers() {
    std::size_t count = 0;
    if (!in_.read_array(count) || count > peer_limits::kEvents) return false;
    out_.workers.resize(count);
    for (std::string_view& identity : out_.workers) {
      if (!in_.read_string(identity) || identity.empty() || identity.size() > peer_limits::kIdentityBytes) return false;
    }
    return true;
  }

  bool read_events() {
    std::size_t count = 0;
    if (!in_.read_array(count) || count > peer_limits::kEvents) return false;
    out_.events.resize(count);
    for (PeerEvent& event : out_.events) {
      std::size_t fields = 0;
      std::uint64_t kind = 0;
      if (!in_.read_array(fields) || !in_.read_uint(kind) || kind > static_cast<std::uint64_t>(Kind::kBye))
        return false;
      event = {};
      event.kind = static_cast<Kind>(kind);
      if (fields != fields_of(event.kind) || !read_event(event)) return false;
    }
    return true;
  }

  bool read_event(PeerEvent& event) {
    switch (event.kind) {
      case Kind::kRouted:
        return read_request(event.request) && read_prefixes(event);
      case Kind::kFirstToken:
        return in_.read_uint(event.request.ticket);
      case Kind::kComplete:
        return in_.read_uint(event.request.ticket) && read_completion(event.completion);
      case Kind::kState:
        return read_state(event);
      case Kind::kBye:
        return true;
    }
    return false;
  }

  bool read_request(PeerRequest& request) {
    std::uint64_t worker = 0;
    if (!in_.read_uint(request.ticket) || !in_.read_uint(worker) || worker >= out_.workers.size()) return false;
    request.worker = static_cast<std::uint32_t>(worker);
    return in_.read_uint(request.num_tokens) && request.num_tokens > 0 && request.num_tokens <= peer_limits::kTokens &&
           in_.read_uint(request.miss_tokens) && request.miss_tokens <= request.num_tokens &&
           in_.read_uint(request.prompt);
  }

  bool read_prefixes(PeerEvent& event) {
    std::string_view bytes;
    if (!in_.read_binary(bytes) || bytes.size() % sizeof(PrefixHash) != 0) return false;
    event.count = bytes.size() / sizeof(PrefixHash);
    event.begin = out_.prefixes.size();
    if (event.count > peer_limits::kPrefixes) return false;
    out_.prefixes.resize(event.begin + event.count);
    if (!bytes.empty()) std::memcpy(&out_.prefixes[event.begin], bytes.data(), bytes.size());
    return true;
  }

  bool read_completion(Completion& completion) {
    return in_.read_int(completion.output_tokens) && completion.output_tokens >= -1 &&
           completion.output_tokens <= kMaxOutput && in_.read_double(completion.first_token_s) &&
           completion.first_token_s >= 0 && completion.first_token_s <= kMaxSeconds;  // not a NaN, either
  }

  bool read_state(PeerEvent& event) {
    if (!in_.read_uint(event.slots_begin) || !in_.read_uint(event.slots_end) || event.slots_begin >= event.slots_end ||
        event.slots_end > std::uint64_t{1} << 32 || !in_.read_array(event.count) ||
        event.count > peer_limits::kEvents) {
      return false;
    }
    event.begin = out_.requests.size();
    std::uint64_t next_slot = event.slots_begin;
    for (std::size_t i = 0; i < event.count; ++i) {
      PeerRequest request;
      if (!array_of(6) || !read_request(request) || !in_.read_bool(request.prefilled)) return false;
      const std::uint64_t slot = request.ticket & 0xffffffff;
      if (slot < next_slot || slot >= event.slots_end) return false;  // each once, in order
      next_slot = slot + 1;
      out_.requests.push_back(request);
    }
    return true;
  }

  MsgpackReader in_;
  PeerMessage& out_;
};

}  // namespace

std::string identity_of(const WorkerEndpoints& endpoints) {
  std::string identity = !endpoints.http.empty()        ? endpoints.http
                         : !endpoints.kv_events.empty() ? endpoints.kv_events
                                                        : endpoints.load;
  if (!identity.empty() && endpoints.engine) identity += "#" + std::to_string(*endpoints.engine);
  return identity.size() <= peer_limits::kIdentityBytes ? identity : std::string();
}

void PeerMessage::clear() {
  workers.clear();
  events.clear();
  prefixes.clear();
  requests.clear();
}

void encode(const PeerMessage& message, std::string& out) {
  out.clear();
  MsgpackWriter writer(out);
  writer.array(6);
  writer.uint(kVersion);
  writer.uint(message.incarnation);
  writer.uint(message.sequence);
  writer.uint(message.block_size);
  writer.array(message.workers.size());
  for (const std::string_view identity : message.workers) writer.str(identity);
  writer.array(message.events.size());
  for (const PeerEvent& event : message.events) {
    writer.array(fields_of(event.kind));
    writer.uint(static_cast<std::uint64_t>(event.kind));
    switch (event.kind) {
      case Kind::kRouted: {
        write_request(writer, event.request);
        const PrefixHash* first = message.prefixes.data() + event.begin;
        writer.bin({reinterpret_cast<const char*>(first), event.count * sizeof(PrefixHash)});
        break;
      }
      case Kind::kFirstToken:
        writer.uint(event.request.ticket);
        break;
      case Kind::kComplete:
        writer.uint(event.request.ticket);
        writer.integer(std::clamp<std::int64_t>(event.completion.output_tokens, -1, kMaxOutput));
        // A comparison with what is no number is false.
        writer.float64(event.completion.first_token_s > 0 ? std::min(event.completion.first_token_s, kMaxSeconds) : 0);
        break;
      case Kind::kState:
        writer.uint(event.slots_begin);
        writer.uint(event.slots_end);
        writer.array(event.count);
        for (std::size_t i = event.begin; i < event.begin + event.count; ++i) {
          writer.array(6);
          write_request(writer, message.requests[i]);
          writer.boolean(message.requests[i].prefilled);
        }
        break;
      case Kind::kBye:
        break;
    }
  }
}

bool decode(std::span<const std::byte> bytes, PeerMessage& out) {
  out.clear();
  return bytes.size() <= peer_limits::kMessageBytes && Decoder(bytes, out).read();
}

}  // namespace kvrouter
