// A fleet of simulated workers behind the product's own router, in virtual time: what a policy makes of a workload.
//
// Each worker is the scheduler of sim/scheduler.h with a step-time model.  Its KV events are encoded as it would
// publish them, reach the router after a delay, and go through the router's decoder into its index; load messages
// likewise, with a delay and a rate of their own, and may be lost.  The router is kvrouter::Router with its clock set
// to the simulation's, so that what decides here is what decides in production.
//
// Nothing sleeps and nothing is random but what the seed gives: the same input gives the same result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sim/scheduler.h"
#include "sim/step_time.h"

namespace kvrouter::sim {

// A run of tokens: drawn from `seed`, the same for every segment of that seed.
struct Segment {
  std::uint64_t seed = 0;
  std::int32_t length = 0;  // tokens
};

struct FleetRequest {
  double arrival = 0;         // seconds from the start; of a follow-up: from the end of the one before it
  std::int64_t follows = -1;  // index of an earlier request: the prompt is that one's prompt and output, and then
                              // `segments`; -1: `segments` alone
  std::int32_t output_tokens = 1;
  double expected_output = 0;  // what the client could tell the router; 0: nothing
  std::vector<Segment> segments;
};

struct FleetOptions {
  std::int32_t num_workers = 2;
  std::string policy = "linear";
  std::uint64_t seed = 0;
  SchedulerOptions scheduler;
  BlockManagerOptions blocks;
  StepTimeModel time;
  double event_delay = 5e-3;     // seconds until KV events reach the router
  double load_delay = 5e-3;      // and load messages
  double load_interval = 0;      // seconds between two load messages of a worker; 0: one a step
  double load_loss = 0;          // share of the load messages that are lost, 0 to 1
  double network_delay = 1e-3;   // seconds from the decision to the worker
  bool feedback = true;          // the router is told of first tokens and completions
  bool batches = true;           // requests that arrive at one moment are decided in one call; users send one by one
  std::int32_t users = 0;        // > 0: as many clients send the requests in order, one each at a time
  std::vector<double> slowdown;  // a worker's times are multiplied by its entry; empty: all alike
};

struct FleetResult {
  double seconds = 0;       // until the last request is done
  double tokens_per_s = 0;  // prompts and outputs
  double ttft_p50_s = 0, ttft_p99_s = 0;
  double latency_p99_s = 0;
  double hit_rate = 0;   // tokens found in the workers' caches, of those looked up
  double imbalance = 0;  // tokens served by the busiest worker, relative to the mean
  std::int64_t preemptions = 0;
  std::int64_t steps = 0;
  std::int64_t requests = 0;
  double decision_p50_us = 0;  // of real time
};

// Throws std::invalid_argument, naming the option or the request, for input that cannot be run.
FleetResult run_fleet(const FleetOptions& options, const std::vector<FleetRequest>& requests);

}  // namespace kvrouter::sim
