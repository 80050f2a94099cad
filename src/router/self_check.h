// Whether the router's belief is true: the hits that it predicted against those that workers report, worker by worker.
//
// Reports are judged in windows of kWindow requests.  Two things can be wrong, and are kept apart: tokens that were
// predicted and not found (the router believes in blocks that are gone), and tokens that were found and not predicted
// (it does not know of blocks that are there).  A window in which either is more than its share begins an episode,
// which is told once, with the likely cause and the setting that mends it; a window without ends it.
//
// A prefix that was on its way when its next request was decided is found without having been predicted, and nothing is
// wrong.  So a surplus counts only if the index does not know of it afterwards either, or if there is a sign of what is
// amiss.
//
// The cause is concluded from what the worker's events did during the window.  It is likely, not sure.
//
// Safe for threads.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "kvrouter/router.h"
#include "router/notices.h"

namespace kvrouter {

// Counts from which causes are concluded, as of some moment.
struct HitEvidence {
  KvEventCounts events;
  std::uint64_t interruptions = 0;    // gaps and restarts
  std::size_t orphans = 0;            // of all workers
  std::uint64_t given_up_blocks = 0;  // by the index, at its memory limit
};

class SelfCheck {
 public:
  static constexpr std::uint64_t kWindow = 64;  // requests
  // Shares of the prompts' tokens.  Caches are evicted from between a decision and the request's turn, so a few per
  // cent are nothing.
  static constexpr double kMissingShare = 0.1;
  static constexpr double kSurplusShare = 0.2;

  SelfCheck(std::size_t num_workers, std::size_t block_size, Notices& notices,
            std::function<HitEvidence(WorkerId)> evidence);

  // `known_now`: leading blocks of the request that the index knows the worker to hold by now; nothing: not looked up.
  void report(WorkerId worker, const HitReport& report, std::optional<std::uint32_t> known_now);
  // Too little and too much within the totals cancel out, and what was on its way is not told apart.
  void report(WorkerId worker, const HitTotals& totals);
  // Another worker has this number now.
  void forget(WorkerId worker);
  HitCheckStatus status(WorkerId worker) const;

  struct Window {
    std::uint64_t requests = 0;
    std::uint64_t prompt_tokens = 0;
    std::uint64_t missing_tokens = 0;    // predicted, not found
    std::uint64_t surplus_tokens = 0;    // found, not predicted
    std::uint64_t unknown_tokens = 0;    // of these, not known to the index afterwards either
    std::uint64_t missing_requests = 0;  // with missing tokens
    std::uint64_t missing_all = 0;       // of these, with no hit at all
  };
  // What is wrong, nothing if all is well.  `before` and `after`: at the window's ends.
  static std::optional<HitCause> judge(const Window& window, const HitEvidence& before, const HitEvidence& after,
                                       std::size_t block_size);

 private:
  struct Worker {
    Window window;
    HitEvidence before;
    HitCheckStatus status;
    std::uint64_t generation = 0;
  };
  void add(WorkerId worker, const HitTotals& totals, std::uint64_t unknown_tokens);
  void conclude(WorkerId worker, const Window& window, std::uint64_t generation);

  const std::size_t block_size_;
  Notices& notices_;
  const std::function<HitEvidence(WorkerId)> evidence_;
  mutable std::mutex mutex_;
  std::vector<Worker> workers_;
};

}  // namespace kvrouter
