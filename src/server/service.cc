#include "server/service.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "server/api_error.h"
#include "server/dashboard.h"
#include "server/registry_api.h"
#include "server/route_api.h"
#include "server/router_api.h"
#include "server/service_metrics.h"
#include "server/snapshot_api.h"

namespace kvrouter {
namespace {

constexpr std::string_view kJson = "application/json";

bool is_router_call(std::string_view path) {
  return path == "/find_best_worker" || path == "/find_best_workers" || path == "/find_worker_round_robin" ||
         path == "/reset";
}

bool is_completion(std::string_view path) {
  return path == "/v1/completions" || path == "/v1/chat/completions";
}

// What clients ask of a model, as against what operators ask of a worker.
bool is_model_call(std::string_view path) {
  if (path == "/v1/load_lora_adapter" || path == "/v1/unload_lora_adapter") return false;
  if (path.find("/..") != std::string_view::npos || path.find('%') != std::string_view::npos) return false;
  if (path.starts_with("/v1/")) return true;
  for (const std::string_view known :
       {"/tokenize", "/detokenize", "/version", "/score", "/rerank", "/pooling", "/classify", "/embed"}) {
    if (path == known) return true;
  }
  return false;
}

AccessLevel level_of(const HttpRequest& request) {
  const std::string_view path = request.path;
  if (path == "/" || path == "/health" || path == "/ready") return AccessLevel::kPublic;
  if (path == "/reset" || path == "/snapshot") return AccessLevel::kAdmin;
  if (path == "/workers" || path.starts_with("/workers/"))
    return request.method == "GET" ? AccessLevel::kApi : AccessLevel::kAdmin;
  if (path == "/metrics" || path == "/dashboard.json" || path == "/route" || is_router_call(path)) {
    return AccessLevel::kApi;
  }
  return is_model_call(path) ? AccessLevel::kApi : AccessLevel::kAdmin;
}

}  // namespace

class Service::Impl {
 public:
  Impl(Router& router, const ServiceOptions& options)
      : router_(router),
        options_(options),
        log_(options.access_log),
        snapshots_(router, options.snapshot_file),
        server_(
            options.host, options.port, [this](boost::asio::io_context& io) { return make(io); }, options.http,
            options.tls) {}

  ~Impl() {
    stop();
    clear();
  }

  std::uint16_t port() const { return server_.port(); }
  void stop() { server_.stop(); }

 private:
  // Their sockets go before the server, whose context they belong to.
  void clear() {
    gateway_.reset();
    tokenizer_.reset();
    fleet_.reset();
  }

  HttpService make(boost::asio::io_context& io) {
    fleet_ = std::make_unique<Fleet>(io, router_, options_.fleet);
    tokenizer_ = std::make_unique<Tokenizer>(*fleet_);
    gateway_ = std::make_unique<Gateway>(io, router_, *fleet_, *tokenizer_, log_, options_.gateway);
    for (const WorkerSpec& spec : options_.workers) {
      const Fleet::Added added = fleet_->add(spec);
      if (added.error.empty()) continue;
      clear();  // before the context goes, whose thread has not begun
      throw std::invalid_argument(added.error);
    }
    return {[this](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
              handle(std::move(request), std::move(reply));
            },
            [this] {
              gateway_->stop();
              fleet_->stop();
            }};
  }

  void handle(HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    const AccessAnswer access = check_access(options_.tokens, level_of(request), request.headers);
    if (access.status != 0) {
      if (access.status == 401) reply->add_header("www-authenticate", "Bearer");
      return reply->send(access.status, kJson, api_error_json(access.status, access.reason));
    }
    const std::string_view path = request.path;
    const bool get = request.method == "GET";
    if (is_completion(path)) {
      if (request.method == "POST") return gateway_->handle(std::move(request), std::move(reply), true);
      return reply->send(405, kJson, api_error_json(405, "use POST"));
    }
    if (is_router_call(path)) {
      const ApiAnswer answer = answer_router_request(router_, request);
      return reply->send(answer.status, kJson, answer.body);
    }
    if (path == "/route") return answer_route(router_, *fleet_, *tokenizer_, request, std::move(reply));
    if (path == "/workers" || path.starts_with("/workers/")) {
      const ApiAnswer answer = answer_registry_request(router_, *fleet_, request);
      return reply->send(answer.status, kJson, answer.body);
    }
    if (path == "/snapshot") return snapshots_.answer(request, std::move(reply));
    if (path == "/v1/models" && get) return reply->send(200, kJson, gateway_->models_json());
    if (path == "/" && get) {
      reply->add_header(
          "content-security-policy",
          "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'");
      return reply->send(200, "text/html; charset=utf-8", std::string(dashboard_page()));
    }
    if (path == "/health" && get) return reply->send(200, kJson, R"({"status":"ok"})");
    if (path == "/ready" && get) {
      if (fleet_->any_healthy()) return reply->send(200, kJson, R"({"status":"ready"})");
      return reply->send(503, kJson, R"({"status":"no worker can be reached"})");
    }
    if (path == "/metrics" && get) {
      return reply->send(200, "text/plain; version=0.0.4; charset=utf-8",
                         service_metrics(router_, *fleet_, *gateway_, *tokenizer_));
    }
    if (path == "/dashboard.json" && get) {
      return reply->send(200, kJson, dashboard_json(router_, *fleet_, *gateway_));
    }
    if (path == "/" || request.method == "HEAD" || request.method == "CONNECT" || request.method == "TRACE") {
      return reply->send(405, kJson, api_error_json(405, "this method is not served here"));
    }
    gateway_->handle(std::move(request), std::move(reply), false);
  }

  Router& router_;
  const ServiceOptions options_;
  AccessLog log_;
  SnapshotApi snapshots_;
  std::unique_ptr<Fleet> fleet_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Gateway> gateway_;
  HttpServer server_;
};

Service::Service(Router& router, const ServiceOptions& options) : impl_(std::make_unique<Impl>(router, options)) {}
Service::~Service() = default;
std::uint16_t Service::port() const {
  return impl_->port();
}
void Service::stop() {
  impl_->stop();
}

}  // namespace kvrouter
