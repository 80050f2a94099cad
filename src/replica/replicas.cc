#include "replica/replicas.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>
#include <zmq.hpp>

namespace kvrouter {
namespace {

using Clock = std::chrono::steady_clock;
using Level = RouterNotice::Level;

constexpr std::chrono::milliseconds kTick{50};
constexpr int kHighWaterMark = 10'000;  // messages, of a peer that reads slower than this replica decides
constexpr int kLingerMs = 200;          // for the word that this replica leaves
constexpr int kMessagesPerTurn = 256;
constexpr std::size_t kEventsPerMessage = 512;
constexpr std::size_t kPrefixesPerMessage = 1 << 15;  // 256 KiB, one request's over
constexpr std::size_t kSlotsPerState = 1024;          // a worker each, in the worst case, whose name takes half a KiB

void set_options(zmq::socket_t& socket, const std::string& endpoint, int linger_ms) {
  socket.set(zmq::sockopt::linger, linger_ms);
  socket.set(zmq::sockopt::sndhwm, kHighWaterMark);
  socket.set(zmq::sockopt::rcvhwm, kHighWaterMark);
  socket.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(peer_limits::kMessageBytes));
  if (endpoint.find('[') != std::string::npos) socket.set(zmq::sockopt::ipv6, true);
}

std::uint64_t random_id() {
  std::random_device random;
  return std::uint64_t{random()} << 32 | random();
}

}  // namespace

// The sockets and their thread, from a start() to the next stop().
class Replicas::Link {
 public:
  explicit Link(Replicas& owner) : owner_(owner), pub_(zmq_, zmq::socket_type::pub) {
    const ReplicaOptions& options = owner.options_;
    if (!options.bind.empty()) {
      set_options(pub_, options.bind, kLingerMs);
      try {
        pub_.bind(options.bind);
      } catch (const zmq::error_t& error) {
        throw std::runtime_error("replica_bind '" + options.bind + "': " + error.what() +
                                 "; it must be a free tcp://address:port of this machine");
      }
    }
    for (const std::string& endpoint : options.peers) {
      peers_.push_back(std::make_unique<Peer>(endpoint, incarnation_, owner.block_size_, owner.host_));
      try {
        dial(*peers_.back());
      } catch (const zmq::error_t& error) {
        throw std::runtime_error("replica_peers '" + endpoint + "': " + error.what() + "; give tcp://host:port");
      }
    }
    publish_status();
    thread_ = std::thread([this] { run(); });
  }

  ~Link() {
    stop_ = true;
    owner_.wake();
    thread_.join();
    for (auto& peer : peers_) peer->book.forget();
    publish_status();
  }

 private:
  struct Peer {
    Peer(std::string at, std::uint64_t own, std::size_t block_size, PeerSink& sink)
        : endpoint(std::move(at)), book(own, block_size, sink) {}

    std::string endpoint;
    std::optional<zmq::socket_t> socket;  // none: it is this replica itself
    PeerBook book;
    bool live = false;
    bool told_block_size = false;
    std::uint64_t losses = 0;
    Clock::time_point heard_at{};
    Clock::time_point dialled_at{};
  };

  void dial(Peer& peer) {
    peer.socket.emplace(zmq_, zmq::socket_type::sub);
    set_options(*peer.socket, peer.endpoint, 0);
    peer.socket->set(zmq::sockopt::reconnect_ivl, 100);
    peer.socket->set(zmq::sockopt::reconnect_ivl_max, 500);
    peer.socket->set(zmq::sockopt::subscribe, "");
    peer.socket->connect(peer.endpoint);
    peer.dialled_at = Clock::now();
  }

  void run() {
    pthread_setname_np(pthread_self(), "kvrouter-peers");
    while (!stop_) {
      try {
        turn();
      } catch (const std::exception& error) {  // a signal, or no memory: the next turn may succeed
        if (!stop_) owner_.host_.tell(Level::kError, std::string("in the replicas' thread: ") + error.what());
        std::this_thread::sleep_for(kTick);
      }
    }
    try {
      send_events();
      message_.clear();
      message_.events.emplace_back().kind = PeerEvent::Kind::kBye;
      send();
    } catch (const std::exception&) {
      // Then the peers learn by silence that this replica is gone.
    }
  }

  void turn() {
    polled_ = {{nullptr, owner_.wake_, ZMQ_POLLIN, 0}};
    polled_peers_.clear();
    for (auto& peer : peers_) {
      if (!peer->socket) continue;
      polled_.push_back({peer->socket->handle(), 0, ZMQ_POLLIN, 0});
      polled_peers_.push_back(peer.get());
    }
    zmq::poll(polled_.data(), polled_.size(), kTick);
    if (polled_[0].revents & ZMQ_POLLIN) {
      std::uint64_t count = 0;
      (void)!read(owner_.wake_, &count, sizeof count);
      send_events();
    }
    for (std::size_t i = 0; i < polled_peers_.size(); ++i) {
      if (polled_[i + 1].revents & ZMQ_POLLIN) read_from(*polled_peers_[i]);
    }
    const auto now = Clock::now();
    if (now >= state_due_) {
      send_state();
      state_due_ = now + kStateInterval;
    } else if (now - sent_at_ >= kHeartbeat) {
      message_.clear();
      send();
    }
    for (auto& peer : peers_) watch(*peer, now);
    publish_status();
  }

  // --- sending ---

  std::uint32_t place_of(WorkerId worker) {
    const auto [place, fresh] = places_.try_emplace(worker, static_cast<std::uint32_t>(identities_.size()));
    if (fresh) identities_.push_back(owner_.host_.identity(worker));
    return place->second;
  }

  void send_events() {
    owner_.outbox_.take(taken_);
    dropped_ += taken_.dropped;
    message_.clear();
    for (const PeerEvent& event : taken_.events) {
      PeerEvent& copy = message_.events.emplace_back(event);
      if (event.kind == PeerEvent::Kind::kRouted) {
        copy.request.worker = place_of(event.request.worker);
        if (identities_[copy.request.worker].empty()) {  // a worker without an address is nobody else's
          message_.events.pop_back();
          continue;
        }
        copy.begin = message_.prefixes.size();
        const auto first = taken_.prefixes.begin() + static_cast<std::ptrdiff_t>(event.begin);
        message_.prefixes.insert(message_.prefixes.end(), first, first + static_cast<std::ptrdiff_t>(event.count));
      }
      if (message_.events.size() >= kEventsPerMessage || message_.prefixes.size() >= kPrefixesPerMessage) {
        send();
        message_.clear();
      }
    }
    if (!message_.events.empty()) send();
  }

  void send_state() {
    constexpr std::uint64_t kEnd = std::uint64_t{1} << 32;
    std::size_t slots = 0;
    std::size_t begin = 0;
    do {
      message_.clear();
      PeerEvent& state = message_.events.emplace_back();
      state.kind = PeerEvent::Kind::kState;
      slots = owner_.host_.own_requests(begin, begin + kSlotsPerState, message_.requests);
      std::size_t kept = 0;
      for (PeerRequest& request : message_.requests) {
        request.worker = place_of(request.worker);
        if (!identities_[request.worker].empty()) message_.requests[kept++] = request;
      }
      message_.requests.resize(kept);
      state.count = kept;
      state.slots_begin = begin;
      begin += kSlotsPerState;
      state.slots_end = begin < slots ? begin : kEnd;
      send();
    } while (begin < slots);
  }

  // message_, with the workers that it names.
  void send() {
    message_.incarnation = incarnation_;
    message_.sequence = sequence_++;
    message_.block_size = owner_.block_size_;
    // A name that no worker has, for one that has no address: no event refers to it.
    for (const std::string& identity : identities_) {
      message_.workers.push_back(identity.empty() ? std::string_view("-") : std::string_view(identity));
    }
    encode(message_, bytes_);
    message_.workers.clear();
    places_.clear();
    identities_.clear();
    sent_at_ = Clock::now();
    if (owner_.options_.bind.empty()) return;
    pub_.send(zmq::buffer(bytes_), zmq::send_flags::dontwait);  // a PUB drops for those who do not read
    ++sent_;
  }

  // --- receiving ---

  void read_from(Peer& peer) {
    zmq::message_t bytes;
    for (int i = 0; i < kMessagesPerTurn && peer.socket && peer.socket->recv(bytes, zmq::recv_flags::dontwait); ++i) {
      while (bytes.more() && peer.socket->recv(bytes, zmq::recv_flags::dontwait)) {
      }
      switch (peer.book.on_message({static_cast<const std::byte*>(bytes.data()), bytes.size()})) {
        case PeerBook::Outcome::kApplied:
          on_heard(peer);
          break;
        case PeerBook::Outcome::kBye:
          if (std::exchange(peer.live, false)) tell(Level::kInfo, peer, "has left");
          break;
        case PeerBook::Outcome::kOwn:
          tell(Level::kInfo, peer, "is this replica itself, and not listened to");
          peer.socket.reset();
          break;
        case PeerBook::Outcome::kOtherBlockSize:
          if (std::exchange(peer.told_block_size, true)) break;
          tell(Level::kWarning, peer,
               "routes by blocks of another size, and is not listened to: set --block-size alike");
          break;
        case PeerBook::Outcome::kIgnored:
        case PeerBook::Outcome::kMalformed:
          break;
      }
    }
  }

  void on_heard(Peer& peer) {
    peer.heard_at = Clock::now();
    if (!std::exchange(peer.live, true)) tell(Level::kInfo, peer, "is heard");
  }

  void watch(Peer& peer, Clock::time_point now) {
    if (!peer.socket || now - peer.heard_at < owner_.options_.timeout) return;
    if (std::exchange(peer.live, false)) {
      ++peer.losses;
      tell(Level::kWarning, peer,
           "has been silent for " + std::to_string(owner_.options_.timeout.count()) + " ms: its " +
               std::to_string(peer.book.size()) + " requests in flight do not count any more");
      peer.book.forget();
    }
    // libzmq gives up for good on a peer that broke the protocol: a port that another program had for a moment.
    if (now - peer.dialled_at >= 2 * owner_.options_.timeout) dial(peer);
  }

  void tell(Level level, const Peer& peer, const std::string& text) {
    owner_.host_.tell(level, "replica " + peer.endpoint + " " + text);
  }

  void publish_status() {
    ReplicaStatus status;
    status.sent = sent_;
    status.dropped_events = dropped_;
    for (const auto& peer : peers_) {
      const PeerBook::Counts& counts = peer->book.counts();
      if (peer->socket) ++status.peers;
      if (peer->live) ++status.live;
      status.requests += peer->book.size();
      status.received += counts.messages;
      status.missed += counts.missed;
      status.malformed += counts.malformed;
      status.ignored_events += counts.unknown_workers + counts.not_entered;
      status.losses += peer->losses;
    }
    const std::lock_guard lock(owner_.status_mutex_);
    owner_.status_ = status;
  }

  Replicas& owner_;
  const std::uint64_t incarnation_ = random_id();
  zmq::context_t zmq_;
  zmq::socket_t pub_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<zmq::pollitem_t> polled_;
  std::vector<Peer*> polled_peers_;

  OutgoingEvents taken_;
  PeerMessage message_;
  std::string bytes_;
  std::unordered_map<WorkerId, std::uint32_t> places_;  // of workers in message_
  std::vector<std::string> identities_;
  std::uint64_t sequence_ = 0;
  std::uint64_t sent_ = 0;
  std::uint64_t dropped_ = 0;
  Clock::time_point sent_at_{}, state_due_{};

  std::atomic<bool> stop_{false};
  std::thread thread_;
};

Replicas::Replicas(const ReplicaOptions& options, std::size_t block_size, ReplicaHost& host)
    : options_(options),
      block_size_(block_size),
      host_(host),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      outbox_([this] { wake(); }) {
  if (wake_ < 0) throw std::runtime_error("eventfd: no file descriptors left (see ulimit -n)");
}

Replicas::~Replicas() {
  stop();
  close(wake_);
}

void Replicas::start() {
  if (link_) return;
  OutgoingEvents stale;  // decisions of the time between
  outbox_.take(stale);
  link_ = std::make_unique<Link>(*this);
}

void Replicas::stop() {
  link_.reset();
}

void Replicas::wake() {
  const std::uint64_t one = 1;
  (void)!write(wake_, &one, sizeof one);
}

void Replicas::routed_untracked(WorkerId worker, std::size_t num_tokens) {
  routed({.worker = worker, .num_tokens = num_tokens}, [](auto&) { return std::size_t{0}; });
}

ReplicaStatus Replicas::status() const {
  const std::lock_guard lock(status_mutex_);
  return status_;
}

}  // namespace kvrouter
