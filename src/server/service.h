// The service: router API, gateway, workers' registry, metrics and dashboard behind one HTTP server.
//
//   GET  /                      the dashboard
//   GET  /health, /ready        it runs; it has a worker to send to
//   GET  /metrics               for Prometheus (docs/operations.md has the names)
//   GET  /dashboard.json        what the dashboard shows
//   POST /find_best_worker, /find_best_workers, /find_worker_round_robin, /reset: see router_api.h
//   POST /route                 see route_api.h
//   GET  /workers               what is known of each
//   POST /workers               {"url", "kv_events", "replay", "load", "data_parallel_size"}: a new server, all but
//                               the URL optional; each of its engines is a worker
//   DELETE /workers/N           no new requests; forgotten when its last one has ended
//   POST /workers/N/drain       {"draining": true or false}
//   GET, POST /snapshot         see snapshot_api.h
//   GET  /v1/models             of all workers together
//   POST /v1/completions, /v1/chat/completions, and whatever else a worker answers
//
// Calls that change something for all need the admin token: these of the registry, /reset, /snapshot, and what is
// passed to a worker other than its OpenAI API.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvrouter/router.h"
#include "server/access.h"
#include "server/fleet.h"
#include "server/gateway.h"
#include "server/http_server.h"

namespace kvrouter {

struct ServiceOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 9000;
  std::vector<WorkerSpec> workers;
  AccessTokens tokens;
  std::string snapshot_file;  // where POST /snapshot writes; empty: nowhere
  std::string access_log;     // path, "-" for standard error, or empty
  HttpLimits http;
  TlsFiles tls;
  FleetOptions fleet;
  GatewayOptions gateway;
};

class Service {
 public:
  // `router` has as many workers as the fleet may ever have; which there are is the service's to say.  It must outlive
  // the service.  Throws std::system_error when the address cannot be bound, std::invalid_argument for a worker that
  // cannot be added and for TLS files that cannot be used.
  Service(Router& router, const ServiceOptions& options);
  ~Service();  // stop()
  Service(const Service&) = delete;
  Service& operator=(const Service&) = delete;

  std::uint16_t port() const;
  void stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
