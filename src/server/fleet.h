// The workers that the service sends to: which there are, which may be sent to now, and what they serve.
//
// A worker has a slot of the router's, which it keeps until it is removed and its last request has ended.  Used by the
// service's thread alone.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/router.h"
#include "net/upstream.h"
#include "server/breaker.h"

namespace kvrouter {

// Where a server is; all but the URL may be empty.
struct WorkerSpec {
  std::string url;        // "http://host:port" or "https://host:port"
  std::string kv_events;  // ZMQ endpoints
  std::string replay;
  std::string load;
  // Engines behind the URL.  Each is a worker of its own, with these endpoints' ports plus its rank, as vLLM has it.
  // 0: one engine, which is not asked for by rank.
  unsigned data_parallel_size = 0;
};

inline constexpr unsigned kMaxDataParallelSize = 1024;

// The endpoint of an engine: "tcp://host:port" with the port plus the rank.  Throws std::invalid_argument if it has
// none.
std::string endpoint_of_rank(const std::string& endpoint, unsigned rank);

struct ServedModel {
  std::string id;
  bool adapter = false;  // a LoRA adapter: its KV blocks are shared with nobody else's
};

struct FleetOptions {
  std::chrono::milliseconds health_interval{1000};
  std::chrono::milliseconds health_timeout{2000};
  // So often in a row /health must go unanswered before a worker counts as down: one that computes on all its cores may
  // be late.  Another answer than 200 counts at once.
  unsigned unanswered_probes = 3;
  std::chrono::milliseconds details_interval{5000};  // models and counters
  std::size_t max_concurrency = 256;                 // requests under way at a worker
  std::string ca_file;  // PEM: whom to trust for https workers; empty: the system's authorities
  Breaker::Options breaker;
  UpstreamLimits upstream;
};

struct FleetWorker {
  explicit FleetWorker(const Breaker::Options& options) : breaker(options) {}

  WorkerSpec spec;               // with this engine's own endpoints
  std::optional<unsigned> rank;  // among the engines of its server, if they are told apart
  std::unique_ptr<UpstreamPool> pool;
  std::uint64_t generation = 0;  // tells the worker from the next one in its slot
  bool present = false;
  bool draining = false;
  bool healthy = false;
  unsigned unanswered_probes = 0;  // since the last answer
  bool models_known = false;
  std::string health_error = "it has not been asked yet";
  std::vector<ServedModel> models;
  Breaker breaker;
  std::size_t in_flight = 0;
  std::size_t block_size = 0;  // as its /metrics has it; 0: not known
  std::uint64_t requests = 0, errors = 0;
  std::uint64_t cache_queries = 0, cache_hits = 0;  // tokens, the worker's own counters
  std::uint64_t routed_tokens = 0, predicted_hit_tokens = 0;
  // The router's own sums when its hits were last held against the worker's counters.
  struct Checked {
    HitTotals totals;
    std::uint64_t queries = 0;
    std::uint64_t reports = 0;  // of hits, request by request
  };
  std::uint64_t hit_reports = 0;
  HitTotals expected;  // of what it was sent; cached_tokens is not used
  Checked checked;
};

class Fleet {
 public:
  using Clock = std::chrono::steady_clock;

  Fleet(boost::asio::io_context& io, Router& router, FleetOptions options);
  void stop();

  struct Added {
    std::vector<WorkerId> workers;  // one an engine
    std::string error;              // empty: added
  };
  // All of the server's engines, or none.
  Added add(const WorkerSpec& spec);
  // Nothing new is sent to it; it is forgotten when its last request has ended.  False if there is no such worker.
  bool remove(WorkerId worker);
  bool set_draining(WorkerId worker, bool draining);
  // A worker with this URL.
  std::optional<WorkerId> find(std::string_view url) const;

  std::size_t num_slots() const { return workers_.size(); }
  const FleetWorker& worker(WorkerId worker) const { return workers_[worker]; }
  FleetWorker& worker(WorkerId worker) { return workers_[worker]; }

  enum class Availability { kSome, kFull, kDown, kUnknownModel };
  // Who may serve this model (empty: any model) now, one entry a slot, without `excluded`.
  Availability eligible(std::string_view model, std::optional<WorkerId> excluded, std::vector<std::uint8_t>& out) const;
  // Whether this name is that of an adapter anywhere.
  bool is_adapter(std::string_view model) const;
  bool any_healthy() const;

  void begin_request(WorkerId worker);
  enum class Outcome {
    kSuccess,
    kError,    // it answered, with an error of its own: counts for nothing in its breaker
    kFailure,  // it did not answer, or not to the end
    kAbandoned
  };
  void end_request(WorkerId worker, std::uint64_t generation, Outcome outcome);

  // Called whenever a worker may have become able to take more.
  void on_change(std::function<void()> callback) { on_change_ = std::move(callback); }

 private:
  void add_engine(WorkerId id, const WorkerSpec& spec, const HostPort& address, std::optional<unsigned> rank);
  void tick();
  void probe_health(WorkerId worker);
  void probe_details(WorkerId worker);
  void check_hits(WorkerId worker);
  void free_if_done(WorkerId worker);
  bool current(WorkerId worker, std::uint64_t generation) const;
  void changed();

  boost::asio::io_context& io_;
  Router& router_;
  FleetOptions options_;
  std::shared_ptr<TlsContext> tls_;
  boost::asio::steady_timer timer_;
  std::vector<FleetWorker> workers_;
  std::map<WorkerId, std::shared_ptr<UpstreamCall>> health_calls_, model_calls_, metrics_calls_;
  Clock::time_point details_due_{};
  std::uint64_t last_generation_ = 0;
  std::function<void()> on_change_;
  bool stopped_ = false;
};

}  // namespace kvrouter
