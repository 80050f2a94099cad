#include "router/replay.h"

#include <algorithm>
#include <utility>

namespace kvrouter {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// vLLM looks for requests ten times a second when it has nothing to publish.
constexpr milliseconds kTimeout{2000};
constexpr milliseconds kProbeInterval{1000};
constexpr milliseconds kBackOff{100};
constexpr int kAttempts = 3;
constexpr int kConnectAttempts = 10;
// While replays are not to be had, what has come back is noticed this late at most.
constexpr seconds kUnavailableInterval{5};
// An event connection that is away for longer takes the belief in what the worker caches with it.
constexpr seconds kUnverifiedFor{3};
constexpr std::uint64_t kMaxAnswers = 4'000'000;  // to one request; no buffer is that large

}  // namespace

void Replay::tick(Clock::time_point now, bool kv_connected, Clock::time_point changed_at) {
  if (!kv_connected) {
    if (changed_at != Clock::time_point{} && now - changed_at >= kUnverifiedFor) stream_.forget_unverified();
    return;
  }
  if (asking_) {
    if (now - answered_at_ < kTimeout) return;
    if (progress_) attempts_ = 0;  // a buffer that comes in pieces
    return fail(now);
  }
  if (now < not_before_) return;
  if (stream_.behind() || now - heard_at_ >= kProbeInterval) ask(now);
}

void Replay::ask(Clock::time_point now) {
  answered_at_ = now;
  answers_ = 0;
  progress_ = false;
  if (!client_.ask(stream_.begin_replay())) {
    // Connecting takes a moment.  A socket that is not connected by then counts as one that does not answer.
    if (connecting_++ < kConnectAttempts) {
      not_before_ = now + kBackOff;
      return;
    }
    connecting_ = 0;
    attempts_ = kAttempts;
    return fail(now);
  }
  connecting_ = 0;
  asking_ = true;
}

bool Replay::read(Clock::time_point now) {
  ReplayClient::Answer answer = client_.read();
  if (answer.kind == ReplayClient::Kind::kNothing) return false;
  if (!asking_) return true;  // to a request that is answered already
  answered_at_ = now;
  switch (answer.kind) {
    case ReplayClient::Kind::kBatch: {
      if (++answers_ > kMaxAnswers) {
        fail(now);
        return false;
      }
      const std::uint64_t before = stream_.counts().replayed_batches;
      act(stream_.on_replayed(answer.sequence, answer.bytes()), now);
      progress_ = progress_ || stream_.counts().replayed_batches != before;
      break;
    }
    case ReplayClient::Kind::kEnd:
      act(stream_.on_replay_end(), now);
      break;
    default:
      fail(now);
  }
  return client_.socket() != nullptr;
}

void Replay::act(ReplayStep step, Clock::time_point now) {
  switch (step) {
    case ReplayStep::kGoOn:
      return;
    case ReplayStep::kDone:
      asking_ = false;
      attempts_ = 0;
      heard_at_ = now;
      if (!std::exchange(available_, true)) stream_.start_over();
      return;
    case ReplayStep::kAgain:
      // The rest of the answer must not be taken for the next one's: a new connection has another identity.
      client_.close();
      asking_ = false;
      if (!progress_ && ++attempts_ > kAttempts) return fail(now);
      not_before_ = progress_ ? now : now + kBackOff / 2;
      return;
    case ReplayStep::kWrong:
      return fail(now);
  }
}

void Replay::fail(Clock::time_point now) {
  ++failures_;
  client_.close();
  asking_ = false;
  ++attempts_;
  // Belief that cannot be confirmed ends with the first failure; what was lost is asked for a few times more.
  stream_.forget_unverified();
  if (available_ && attempts_ < kAttempts) {
    not_before_ = now + kBackOff * (1 << std::min(attempts_, 6));
    return;
  }
  attempts_ = 0;
  available_ = false;
  if (!std::exchange(told_unavailable_, true)) tell_unavailable_ = true;
  stream_.give_up();
  not_before_ = now + kUnavailableInterval;
}

void Replay::on_disconnected() {
  client_.close();
  asking_ = false;
  attempts_ = connecting_ = 0;
  not_before_ = {};
}

}  // namespace kvrouter
