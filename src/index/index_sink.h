#pragma once

#include "kvrouter/kv_event.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter {

// Passes a worker's events on to the index.
class IndexSink final : public KvEventSink {
 public:
  IndexSink(PrefixIndex& index, WorkerId worker) : index_(index), worker_(worker) {}
  void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) override {
    index_.store(worker_, parent, blocks);
  }
  void on_removed(std::span<const EngineHash> blocks) override { index_.remove(worker_, blocks); }
  void on_cleared() override { index_.clear(worker_); }

 private:
  PrefixIndex& index_;
  WorkerId worker_;
};

}  // namespace kvrouter
