#include "router/self_check.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvrouter {
namespace {

// What to say of each cause, and its name in status and metrics.
struct Words {
  std::string_view name;
  std::string_view help;
};

Words words_of(HitCause cause) {
  switch (cause) {
    case HitCause::kNone:
      break;
    case HitCause::kClearedLate:
      return {
          "cleared_late",
          "its cache was emptied, which it says only in its next step: call reset(worker, until_cleared=True) before "
          "it is told to (reset_prefix_cache, a weight update)"};
    case HitCause::kOtherGroups:
      return {"other_groups",
              "it has KV-cache groups besides full attention (a hybrid or sliding-window model), which are not indexed "
              "and shorten its hits: start it with --disable-hybrid-kv-cache-manager, or take a policy that goes by "
              "load (router.policy: least_loaded)"};
    case HitCause::kEvicted:
      return {"evicted",
              "blocks are evicted between decision and arrival, as its cache is too small for what it is sent: give it "
              "more memory (--gpu-memory-utilization), or take router.policy: adaptive"};
    case HitCause::kOtherNamespace:
      return {"other_namespace",
              "requests carry a LoRA adapter or a cache_salt that the router was not told: give lora_name to route(), "
              "and hash with extra_keys where cache_salt is used"};
    case HitCause::kNoEvents:
      return {"no_events", "it publishes no KV events: start it with --kv-events-config, with prefix caching on"};
    case HitCause::kBlockSize:
      return {"block_size",
              "its KV blocks have another size: set router.block_size and --block-size to the same value"};
    case HitCause::kUnreadable:
      return {"unreadable", "events of it cannot be read: check that its vLLM release is one that is supported"};
    case HitCause::kLostEvents:
      return {
          "lost_events",
          "events of it were lost, and what it caches is being learnt anew: give it a replay_endpoint, and a larger "
          "buffer_steps or hwm in --kv-events-config if that comes again"};
    case HitCause::kIndexLimit:
      return {"index_limit", "the index has given up what it still caches: raise router.index_memory_limit"};
    case HitCause::kOtherMemory:
      return {"other_memory", "it takes blocks from CPU memory or storage, which are not indexed"};
    case HitCause::kLateStart:
      return {"late_start",
              "it cached prefixes before the router listened: start the router first, or reset the worker's prefix "
              "cache once"};
    case HitCause::kOtherTokens:
      return {
          "other_tokens",
          "the router was given other tokens than it computes: compare usage.prompt_tokens with the length that was "
          "routed (chat template, add_special_tokens), and give lora_name or extra_keys where they apply"};
    case HitCause::kUnknown:
      return {"unknown", "its events do not show why: events may have been lost unseen; reset(worker) learns it anew"};
  }
  return {"", ""};
}

std::string percent(std::uint64_t part, std::uint64_t whole) {
  return std::to_string(whole == 0 ? 0 : (part * 100 + whole / 2) / whole) + "%";
}

}  // namespace

std::string_view name_of(HitCause cause) {
  return words_of(cause).name;
}

SelfCheck::SelfCheck(std::size_t num_workers, std::size_t block_size, Notices& notices,
                     std::function<HitEvidence(WorkerId)> evidence)
    : block_size_(block_size), notices_(notices), evidence_(std::move(evidence)), workers_(num_workers) {}

void SelfCheck::report(WorkerId worker, const HitReport& report, std::optional<std::uint32_t> known_now) {
  if (report.num_tokens == 0) return;
  // vLLM always computes the last token of a prompt.
  const std::size_t most_blocks = (report.num_tokens - 1) / block_size_;
  const std::uint64_t predicted = std::min<std::size_t>(report.overlap_blocks, most_blocks) * block_size_;
  const std::uint64_t cached = std::min(report.cached_tokens, report.num_tokens);
  std::uint64_t unknown = 0;
  if (known_now) {
    const std::uint64_t known = std::max<std::uint64_t>(predicted, std::size_t{*known_now} * block_size_);
    unknown = cached - std::min(cached, known);
  }
  add(worker, {1, report.num_tokens, predicted, cached}, unknown);
}

void SelfCheck::report(WorkerId worker, const HitTotals& totals) {
  if (totals.requests > 0) add(worker, totals, 0);
}

void SelfCheck::add(WorkerId worker, const HitTotals& totals, std::uint64_t unknown_tokens) {
  const std::uint64_t missing = totals.predicted_tokens - std::min(totals.predicted_tokens, totals.cached_tokens);
  const std::uint64_t surplus = totals.cached_tokens - std::min(totals.predicted_tokens, totals.cached_tokens);
  Window full;
  std::uint64_t generation = 0;
  {
    const std::lock_guard lock(mutex_);
    Worker& w = workers_[worker];
    w.status.reports += totals.requests;
    w.status.prompt_tokens += totals.prompt_tokens;
    w.status.predicted_tokens += totals.predicted_tokens;
    w.status.cached_tokens += totals.cached_tokens;
    w.status.missing_tokens += missing;
    w.status.surplus_tokens += surplus;
    w.window.requests += totals.requests;
    w.window.prompt_tokens += totals.prompt_tokens;
    w.window.missing_tokens += missing;
    w.window.surplus_tokens += surplus;
    w.window.unknown_tokens += unknown_tokens;
    if (missing > 0) {
      w.window.missing_requests += totals.requests;
      if (totals.cached_tokens == 0) w.window.missing_all += totals.requests;
    }
    if (w.window.requests < kWindow) return;
    full = std::exchange(w.window, {});
    generation = w.generation;
  }
  conclude(worker, full, generation);
}

std::optional<HitCause> SelfCheck::judge(const Window& window, const HitEvidence& before, const HitEvidence& after,
                                         std::size_t block_size) {
  const auto exceeds = [&](std::uint64_t tokens, double share) {
    return static_cast<double>(tokens) > share * static_cast<double>(window.prompt_tokens);
  };
  const auto grew = [&](auto count) { return count(after) > count(before); };
  if (exceeds(window.missing_tokens, kMissingShare)) {
    // The counts begin anew when the router does.
    const std::uint64_t removed_before = std::min(before.events.removed_blocks, after.events.removed_blocks);
    const std::uint64_t removed = after.events.removed_blocks - removed_before;
    if (grew([](auto& e) { return e.events.cleared; })) return HitCause::kClearedLate;
    if (after.events.skipped_group > 0) return HitCause::kOtherGroups;
    if (removed * block_size * 2 >= window.missing_tokens) return HitCause::kEvicted;
    if (window.missing_all == window.missing_requests) return HitCause::kOtherNamespace;
    return HitCause::kUnknown;
  }
  if (!exceeds(window.surplus_tokens, kSurplusShare)) return std::nullopt;
  // Those that explain it whether the index was asked again or not...
  if (after.events.batches == 0) return HitCause::kNoEvents;
  if (grew([](auto& e) { return e.events.skipped_block_size; })) return HitCause::kBlockSize;
  if (grew([](auto& e) { return e.events.malformed_batches + e.events.skipped_invalid; })) return HitCause::kUnreadable;
  if (after.events.stored_blocks == 0 && after.events.skipped_group > 0) return HitCause::kOtherGroups;
  // ... and those that prefixes on their way would be mistaken for.
  if (!exceeds(window.unknown_tokens, kSurplusShare)) return std::nullopt;
  if (grew([](auto& e) { return e.interruptions; })) return HitCause::kLostEvents;
  if (grew([](auto& e) { return e.given_up_blocks; })) return HitCause::kIndexLimit;
  if (grew([](auto& e) { return e.events.namespaced_blocks; })) return HitCause::kOtherNamespace;
  if (grew([](auto& e) { return e.events.skipped_medium; })) return HitCause::kOtherMemory;
  if (after.orphans > 0) return HitCause::kLateStart;
  return HitCause::kOtherTokens;
}

void SelfCheck::conclude(WorkerId worker, const Window& window, std::uint64_t generation) {
  const HitEvidence after = evidence_(worker);  // without the lock: it takes others
  std::string text;
  bool wrong = false;
  {
    const std::lock_guard lock(mutex_);
    Worker& w = workers_[worker];
    if (w.generation != generation) return;
    const HitCause cause = judge(window, w.before, after, block_size_).value_or(HitCause::kNone);
    const bool was_wrong = w.status.cause != HitCause::kNone;
    wrong = cause != HitCause::kNone;
    w.before = after;
    w.status.cause = cause;
    if (wrong == was_wrong) return;
    if (wrong) {
      ++w.status.episodes;
      text = " hits its cache otherwise than predicted: of " + std::to_string(window.prompt_tokens) +
             " prompt tokens of its last " + std::to_string(window.requests) + " requests, " +
             percent(window.missing_tokens, window.prompt_tokens) + " were predicted and not found, " +
             percent(window.surplus_tokens, window.prompt_tokens) + " found and not predicted. Likely " +
             std::string(words_of(cause).help);
    } else {
      text = " hits its cache as predicted again";
    }
  }
  notices_.post(wrong ? Notice::Level::kWarning : Notice::Level::kInfo, "worker " + std::to_string(worker) + text);
}

void SelfCheck::forget(WorkerId worker) {
  const std::lock_guard lock(mutex_);
  Worker& w = workers_[worker];
  w = {{}, {}, {}, w.generation + 1};
}

HitCheckStatus SelfCheck::status(WorkerId worker) const {
  const std::lock_guard lock(mutex_);
  return workers_[worker].status;
}

}  // namespace kvrouter
