#include "router/in_flight.h"

#include <algorithm>
#include <cmath>

namespace kvrouter {
namespace {

constexpr std::size_t kPromptSlots = 4096;  // power of two
constexpr double kLearningRate = 0.2;       // of a sample of kFullSample tokens
constexpr double kFullSample = 2048;        // tokens
constexpr double kLeastSample = 64;         // fewer tokens say little about the rate
constexpr double kTrusted = 16384;          // tokens; half of a rate is a worker's own once it is learnt from these
constexpr double kMostAbove = 4;            // times the known rate
constexpr double kLengthRate = 0.25;        // of a prompt's output lengths
constexpr double kMeanLengthRate = 0.02;    // of all prompts'
constexpr double kFeedbackPause = 60;       // seconds without completions until load messages take over
constexpr double kFastest = 1e-7, kSlowest = 1;  // seconds a token, whatever was measured

}  // namespace

InFlight::InFlight(std::size_t num_workers) : workers_(num_workers), lengths_(kPromptSlots) {}

double InFlight::seconds_per_token(const WorkerAccount& account) const {
  const double fleet = fleet_seconds_per_token_ > 0 ? fleet_seconds_per_token_ : kPriorSecondsPerToken;
  // A few prefills say more of the moment than of the worker.
  const double own = account.learnt_tokens / (account.learnt_tokens + kTrusted);
  return own * account.seconds_per_token + (1 - own) * fleet;
}

void InFlight::drain(double now, WorkerAccount& account) {
  const double tokens = (now - account.drained_at) / seconds_per_token(account);
  account.done_prefill = std::min(account.sent_prefill, account.done_prefill + std::max(tokens, 0.0));
  account.drained_at = now;
}

Ticket InFlight::add(double now, const Sent& sent) {
  WorkerAccount& account = workers_[sent.worker];
  drain(now, account);
  if (size_ >= kMost && account.first != kNone) {
    remove(account.first);
    ++dropped_;
  }
  if (account.prefilling == 0) {  // idle until now
    account.known_done = account.done_prefill = account.sent_prefill;
    account.known_at = now;
  }

  if (free_ == kNone) {
    free_ = static_cast<Index>(entries_.size());
    entries_.emplace_back();
  }
  const Index index = free_;
  Entry& entry = entries_[index];
  free_ = entry.next;
  entry.worker = sent.worker;
  entry.used = true;
  entry.prefilled = sent.prefilled;
  entry.of_peer = sent.of_peer;
  entry.previous = account.last;
  entry.next = kNone;
  entry.sent_at = now;
  entry.started_after = account.sent_prefill;
  entry.miss_tokens = sent.prefilled ? 0 : static_cast<double>(sent.miss_tokens);
  entry.context_tokens = static_cast<double>(sent.num_tokens);
  entry.prompt = sent.prompt;
  (account.last == kNone ? account.first : entries_[account.last].next) = index;
  account.last = index;
  account.sent_prefill += entry.miss_tokens;
  account.context_tokens += entry.context_tokens;
  ++account.count;
  if (!entry.prefilled) ++account.prefilling;
  ++size_;
  return ticket_of(index);
}

InFlight::Entry* InFlight::find(Ticket ticket) {
  const Index index = static_cast<Index>(ticket);
  if (index >= entries_.size()) return nullptr;
  Entry& entry = entries_[index];
  return entry.used && entry.generation == ticket >> 32 ? &entry : nullptr;
}

void InFlight::learn(WorkerAccount& account, double seconds, double tokens) {
  if (tokens < kLeastSample || seconds <= 0) return;
  // A request may have waited for something else than prefill: no sample counts for much more than is known.
  const double known = account.seconds_per_token > 0 ? kMostAbove * account.seconds_per_token : kSlowest;
  const double sample = std::clamp(seconds / tokens, kFastest, std::min(known, kSlowest));
  const double rate = kLearningRate * std::min(1.0, tokens / kFullSample);
  const auto move = [&](double& mean, double step) { mean = mean > 0 ? mean + step * (sample - mean) : sample; };
  move(account.seconds_per_token, rate);
  account.learnt_tokens += tokens;
  move(fleet_seconds_per_token_, rate / 4);
}

void InFlight::on_prefilled(double now, Entry& entry) {
  if (entry.prefilled) return;
  entry.prefilled = true;
  WorkerAccount& account = workers_[entry.worker];
  --account.prefilling;
  const double done = entry.started_after + entry.miss_tokens;
  if (done > account.known_done) {
    learn(account, now - account.known_at, done - account.known_done);
    account.known_done = done;
    account.known_at = now;
    account.done_prefill = done;
    account.drained_at = now;
  } else if (account.prefilling == 0) {
    account.done_prefill = account.known_done = account.sent_prefill;
    account.drained_at = account.known_at = now;
  }
}

bool InFlight::first_token(double now, Ticket ticket) {
  Entry* entry = find(ticket);
  if (!entry) return false;
  on_prefilled(now, *entry);
  return true;
}

bool InFlight::complete(double now, Ticket ticket, const Completion& completion) {
  Entry* entry = find(ticket);
  if (!entry) return false;
  last_completion_ = now;
  if (!entry->prefilled) {
    // Its first token lies somewhere in between: what is done is known, the rate only if the caller says when.
    WorkerAccount& account = workers_[entry->worker];
    const double first = completion.first_token_s > 0 ? entry->sent_at + completion.first_token_s : account.known_at;
    on_prefilled(std::clamp(first, account.known_at, now), *entry);
  }
  if (completion.output_tokens > 0) {
    const double length = static_cast<double>(completion.output_tokens);
    mean_output_ = mean_output_ > 0 ? mean_output_ + kMeanLengthRate * (length - mean_output_) : length;
    if (entry->prompt != 0) {
      Lengths& lengths = lengths_[entry->prompt % kPromptSlots];
      lengths.mean = lengths.prompt == entry->prompt ? lengths.mean + kLengthRate * (length - lengths.mean) : length;
      lengths.prompt = entry->prompt;
    }
  }
  remove(static_cast<Index>(ticket));
  return true;
}

void InFlight::drop(std::span<const Ticket> tickets) {
  std::vector<bool> affected(workers_.size());
  for (const Ticket ticket : tickets) {
    if (Entry* entry = find(ticket)) affected[entry->worker] = entry->dropped = true;
  }
  for (std::size_t w = 0; w < workers_.size(); ++w) {
    if (!affected[w]) continue;
    WorkerAccount& account = workers_[w];
    // Their prefill goes, and so does what of it counts as done; what stands behind them moves up.
    double gone = 0, gone_done = 0, gone_known = 0;
    const auto share = [](const Entry& entry, double done) {
      return std::clamp(done - entry.started_after, 0.0, entry.miss_tokens);
    };
    for (Index i = account.first; i != kNone; i = entries_[i].next) {
      Entry& entry = entries_[i];
      if (entry.dropped && !entry.prefilled) {
        gone += entry.miss_tokens;
        gone_done += share(entry, account.done_prefill);
        gone_known += share(entry, account.known_done);
      } else {
        entry.started_after -= gone;
      }
    }
    account.sent_prefill -= gone;
    account.done_prefill -= gone_done;
    account.known_done -= gone_known;
    for (Index i = account.first; i != kNone;) {
      const Index next = entries_[i].next;
      if (entries_[i].dropped) remove(i);
      i = next;
    }
  }
}

void InFlight::remove(Index index) {
  Entry& entry = entries_[index];
  WorkerAccount& account = workers_[entry.worker];
  (entry.previous == kNone ? account.first : entries_[entry.previous].next) = entry.next;
  (entry.next == kNone ? account.last : entries_[entry.next].previous) = entry.previous;
  if (!entry.prefilled) --account.prefilling;
  account.context_tokens -= entry.context_tokens;
  if (--account.count == 0) {
    account.context_tokens = 0;  // no rounding is carried along
    account.done_prefill = account.known_done = account.sent_prefill;
  }
  entry.used = entry.dropped = false;
  ++entry.generation;
  entry.next = free_;
  free_ = index;
  --size_;
}

void InFlight::on_load(double now, WorkerId worker, const WorkerLoad& said, std::uint64_t version) {
  WorkerAccount& account = workers_[worker];
  if (version == account.load_version) return;
  account.load_version = version;
  while (account.first != kNone && now - entries_[account.first].sent_at > kExpiry) remove(account.first);
  const std::int64_t known = said.waiting + said.running;
  if (now - last_completion_ < kFeedbackPause) {
    // The account is exact, but for what was sent by others who report nothing.
    if (known >= account.count) return;
    std::int64_t old = 0;
    for (Index i = account.first; i != kNone && now - entries_[i].sent_at > kFeedbackPause; i = entries_[i].next) ++old;
    for (; old > known; --old) remove(account.first);
    return;
  }
  // Those that the worker must know of, and does not count any more, are done.
  std::int64_t surplus = account.count - known;
  while (surplus-- > 0 && account.first != kNone && now - entries_[account.first].sent_at > kMessageAge) {
    remove(account.first);
  }
  // What runs is prefilled, or about to be.
  std::int64_t prefilled = account.count - said.waiting;
  for (Index i = account.first; i != kNone && prefilled-- > 0; i = entries_[i].next) {
    Entry& entry = entries_[i];
    if (now - entry.sent_at <= kMessageAge) break;
    if (entry.prefilled) continue;
    entry.prefilled = true;
    --account.prefilling;
    const double done = entry.started_after + entry.miss_tokens;
    if (done > account.done_prefill) {
      account.done_prefill = done;
      account.drained_at = now;
    }
  }
}

void InFlight::drop_all(WorkerId worker) {
  while (workers_[worker].first != kNone) remove(workers_[worker].first);
}

void InFlight::fill(double now, std::span<WorkerView> rows) {
  for (std::size_t w = 0; w < rows.size(); ++w) {
    WorkerAccount& account = workers_[w];
    drain(now, account);
    rows[w].in_flight = account.count;
    rows[w].prefill_tokens = account.prefilling > 0 ? account.sent_prefill - account.done_prefill : 0;
    rows[w].context_tokens = account.context_tokens;
    rows[w].seconds_per_token = seconds_per_token(account);
  }
}

double InFlight::expected_output(std::uint64_t prompt) const {
  const Lengths& lengths = lengths_[prompt % kPromptSlots];
  return prompt != 0 && lengths.prompt == prompt ? lengths.mean : mean_output_;
}

}  // namespace kvrouter
