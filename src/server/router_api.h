// The router over HTTP, as JSON:
//
//   POST /find_best_worker         {"local_hashes": [u64...], "num_tokens": n} -> {"worker_id": n, "overlap_blocks": k}
//   POST /find_best_workers        {"requests": [the same bodies...]}, decided together
//                                  -> {"worker_ids": [n...], "overlap_blocks": [k...]}
//   POST /find_worker_round_robin  the same body (its values do not matter)    -> {"worker_id": n, "overlap_blocks": 0}
//   POST /reset                    forgets what the workers cache              -> {"status": "ok"}
//     body, or none: {"worker_id": 0, "until_cleared": true}; see Router::reset
//   GET  /workers                  what is known of each worker
//   GET  /health                   {"status": "ok"}
//
// Bad input is answered with 400 and {"detail": reason}.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kvrouter/router.h"
#include "server/http_server.h"

namespace kvrouter {

// The answer to one request; a pure function of it and the router.
struct ApiAnswer {
  unsigned status = 200;
  std::string body;
};
ApiAnswer answer_router_request(Router& router, const HttpRequest& request);

// Serves `router`, which must outlive it.  Throws std::system_error when the address cannot be bound.
class RouterApiServer {
 public:
  RouterApiServer(Router& router, const std::string& host, std::uint16_t port);
  std::uint16_t port() const { return server_.port(); }
  void stop() { server_.stop(); }

 private:
  HttpServer server_;
};

}  // namespace kvrouter
