#pragma once

#include <atomic>
#include <cstdint>

#include "kvrouter/kv_event.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {

// Passes a worker's events on to the index, but for those that a cleared cache has outdated.
//
// A worker that empties its cache says so in its next engine step.  Events that it published before may still be on
// their way then, and a router that has forgotten the worker would believe them.  The fence keeps them out: it goes up
// before the worker is told to empty its cache, and comes down with its AllBlocksCleared, which stands in the stream
// behind the last block of the old cache and before the first of the new one.  A fence that goes up twice needs two of
// them: the first may be late.
//
// Threads: events come from one thread; fence() and lift() may be called from any.
class FencedSink final : public KvEventSink {
 public:
  FencedSink(PrefixIndex& index, WorkerId worker) : index_(index), worker_(worker) {}

  // Forgets what the worker holds, and lets no store in until it has said once more that its cache is cleared.
  void fence() {
    ++resets_;
    ++awaited_;
    index_.clear(worker_);
  }
  // Forgets what the worker holds; what it stores from now on counts.
  void lift() {
    ++resets_;
    on_interrupted();
  }
  // How often either was called.  A replay must not bring back what a reset has removed: its reader watches this.
  std::uint64_t resets() const { return resets_; }
  // Whether it keeps stores out.
  bool fenced() const { return awaited_ > 0; }

  void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) override {
    if (awaited_ > 0) return;
    index_.store(worker_, parent, blocks);
    // The fence may have gone up meanwhile, and the index been cleared before these blocks were in it.
    if (awaited_ > 0) index_.clear(worker_);
  }
  void on_removed(std::span<const EngineHash> blocks) override {
    if (awaited_ == 0) index_.remove(worker_, blocks);
  }
  void on_cleared() override {
    int awaited = awaited_;
    while (awaited > 0 && !awaited_.compare_exchange_weak(awaited, awaited - 1)) {
    }
    index_.clear(worker_);
  }
  // A gap, a reconnection, a restart: the AllBlocksCleared may be among what was lost, and would be waited for in vain.
  // If it is not, old blocks that come between the gap and it are believed until it comes, which is with the worker's
  // next engine step.
  void on_interrupted() override {
    awaited_ = 0;
    index_.clear(worker_);
  }
  // A replay brings the AllBlocksCleared as well: the fence stays up.
  void on_forgotten() override { index_.clear(worker_); }

 private:
  PrefixIndex& index_;
  WorkerId worker_;
  std::atomic<int> awaited_{0};  // AllBlocksCleared still to come
  std::atomic<std::uint64_t> resets_{0};
};

}  // namespace kvrouter
