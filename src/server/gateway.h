// The gateway: an OpenAI-compatible front of all workers.  Each request goes to the worker that the router chooses;
// what the worker answers goes back as it comes.  Used by the service's thread alone.
#pragma once

#include <boost/asio/io_context.hpp>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>

#include "kvrouter/router.h"
#include "server/access_log.h"
#include "server/fleet.h"
#include "server/hot_prefixes.h"
#include "server/http_server.h"
#include "server/tokenizer.h"

namespace kvrouter {

struct GatewayOptions {
  std::size_t max_queue = 1024;  // requests waiting for a worker; beyond: 429
  std::chrono::milliseconds queue_timeout{30'000};
  bool strip_authorization = false;  // it was for the gateway
};

struct GatewayCounters {
  std::uint64_t requests = 0, retries = 0, rejected_full = 0, queue_timeouts = 0, unavailable = 0, client_gone = 0,
                broken_streams = 0, bad_requests = 0;
  std::uint64_t routed_tokens = 0, predicted_hit_tokens = 0;
  std::map<unsigned, std::uint64_t> by_status;
};

// A decision of the last ones, as the dashboard shows it.
struct LoggedDecision {
  double unix_time = 0;
  std::string model;
  Decision decision;
};

class Exchange;

class Gateway {
 public:
  static constexpr std::size_t kLoggedDecisions = 64;

  Gateway(boost::asio::io_context& io, Router& router, Fleet& fleet, Tokenizer& tokenizer, AccessLog& log,
          GatewayOptions options);
  ~Gateway();
  void stop();

  // Passes the request on.  `routed`: its body is a completion's, so that its prompt decides where it goes; else any
  // worker will do.
  void handle(HttpRequest&& request, std::shared_ptr<HttpReply> reply, bool routed);
  // GET /v1/models: what all workers together serve.
  std::string models_json() const;

  const GatewayCounters& counters() const { return counters_; }
  std::size_t in_flight() const { return exchanges_.size(); }
  std::size_t queued() const { return queue_.size(); }
  const HotPrefixes& hot_prefixes() const { return hot_prefixes_; }
  const std::deque<LoggedDecision>& decisions() const { return decisions_; }

 private:
  friend class Exchange;
  void serve_queue();
  void log_decision(const std::string& model, std::span<const LocalHash> blocks, const Decision& decision);

  boost::asio::io_context& io_;
  Router& router_;
  Fleet& fleet_;
  Tokenizer& tokenizer_;
  AccessLog& log_;
  GatewayOptions options_;
  GatewayCounters counters_;
  std::unordered_set<std::shared_ptr<Exchange>> exchanges_;
  std::list<Exchange*> queue_;  // first come first served
  HotPrefixes hot_prefixes_;
  std::deque<LoggedDecision> decisions_;
  bool serving_queue_ = false;
};

}  // namespace kvrouter
