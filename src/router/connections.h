// The router's ears: one thread that reads the KV events and load messages of all workers.
//
// Each worker has two channels (KV events, load), each a ZMQ SUB socket with a monitor that tells when the connection
// is made and lost.  From these follows the worker's state: connecting until a channel has been up, up while one is,
// down when all that were up are lost.  A lost KV channel empties the worker's part of the index at once.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <vector>

#include "kvrouter/router.h"
#include "replica/snapshot.h"
#include "router/fenced_sink.h"
#include "router/notices.h"

namespace kvrouter {

class Connections {
 public:
  struct Context {  // what the connections feed; all outlive them
    const RouterOptions& options;
    std::deque<FencedSink>& sinks;  // one a worker
    LoadTable& loads;
    Notices& notices;
    const std::atomic<std::uint64_t>* decisions;  // one a worker
    std::shared_mutex& links_mutex;               // held by readers of state() and describe()
    // Takes what a snapshot has of a worker, if it has anything; called by the network's thread, too.
    std::function<std::optional<WorkerSnapshot>(const WorkerEndpoints&)> take_snapshot;
  };

  // Connects and starts the thread.  Throws std::runtime_error.
  Connections(const Context& context, bool kv_events);
  ~Connections();  // stops and joins
  Connections(const Connections&) = delete;
  Connections& operator=(const Connections&) = delete;

  // Closes what it has of the worker and connects to the new endpoints.  Returns when that is done.  Throws
  // std::invalid_argument for an endpoint that is none; the worker then stays as it was.
  // REQUIRES: links_mutex is not held by the caller.
  void replace(WorkerId worker, const WorkerEndpoints& endpoints);

  // What is known of the worker's cache, see WorkerLink::capture().
  // REQUIRES: links_mutex is not held by the caller; one call of this and replace() at a time.
  std::optional<WorkerSnapshot> capture(WorkerId worker, const PrefixIndex& index);

  // REQUIRES (both): links_mutex is held, shared.
  WorkerState state(WorkerId worker) const;
  bool hears_kv_events(WorkerId worker) const;
  // Fills in what the connections know: state, load source and counts.
  void describe(WorkerId worker, WorkerStatus& status) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
