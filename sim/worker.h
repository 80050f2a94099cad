// A process's worth of simulated vLLM worker: the engine in real time behind an HTTP server and ZMQ sockets.
//
//   POST /v1/completions, POST /tokenize, GET /v1/models, GET /health, GET /metrics, POST /reset_prefix_cache
//   GET /debug/blocks, where it is switched on: the names of the blocks that the cache holds, for who checks an index
//   KV events (PUB) and their replay (ROUTER), load messages (PUB)
//
// One thread runs the engine and the ZMQ sockets, one the HTTP server.  Requests wait in the engine thread's inbox
// until the step under way is done, as they do in vLLM.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "sim/block_manager.h"
#include "sim/scheduler.h"
#include "sim/step_time.h"

namespace kvrouter::sim {

struct WorkerOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8000;       // 0: any free one
  std::string kv_events_endpoint;  // these three are bound; empty: off
  std::string replay_endpoint;
  std::string load_endpoint;
  std::string topic = "kv";
  std::string model = "sim";
  std::size_t replay_buffer = 10'000;  // batches
  bool array_events = false;           // see EventPublisherOptions
  bool byte_hashes = false;
  bool debug = false;  // serve /debug/blocks
  BlockManagerOptions blocks;
  SchedulerOptions scheduler;
  StepTimeModel time;
};

class Worker {
 public:
  // Throws std::invalid_argument for options that make no sense together, std::runtime_error when an address is taken;
  // the message begins with the option's name.
  explicit Worker(const WorkerOptions& options);
  ~Worker();  // stop()
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // The addresses in use, with the ports that were taken for 0 and "*".
  std::uint16_t port() const;
  const std::string& kv_events_endpoint() const;
  const std::string& replay_endpoint() const;
  const std::string& load_endpoint() const;

  // Drops what is running and frees the ports.  Safe to call twice, from any thread.
  void stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter::sim
