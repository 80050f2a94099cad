// Requests to the service's own API: decisions, the registry of workers, resets.
//
// Input: a byte for path and method; the rest is the body, or, for the last choice, the path.
#include <array>
#include <boost/asio/io_context.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "fuzz.h"
#include "server/fleet.h"
#include "server/registry_api.h"
#include "server/route_api.h"
#include "server/router_api.h"

namespace kvrouter::fuzz {
namespace {

struct Call {
  const char* method;
  const char* path;
};
constexpr std::array kCalls = {
    Call{"POST", "/find_best_worker"},
    Call{"POST", "/find_best_workers"},
    Call{"POST", "/find_worker_round_robin"},
    Call{"POST", "/reset"},
    Call{"POST", "/route"},
    Call{"POST", "/workers"},
    Call{"POST", "/workers/1/drain"},
    Call{"DELETE", "/workers/99"},
    Call{"GET", nullptr},
};

// One for the whole run: what one request leaves behind must not hurt the next.
struct Site {
  Site() : router(options()), fleet(io, router, {}), tokenizer(fleet) {
    // Every slot is taken, and `io` never runs: no input makes anything call out.
    for (int port = 1; port <= 3; ++port) fleet.add({"http://127.0.0.1:" + std::to_string(port), "", "", ""});
  }
  static RouterOptions options() {
    RouterOptions options;
    options.block_size = 4;
    options.workers.resize(3);
    options.policy = "adaptive";
    options.clock = [] { return 1.0; };
    return options;
  }
  Router router;
  boost::asio::io_context io;
  Fleet fleet;
  Tokenizer tokenizer;
};

class Reply final : public HttpReply {
 public:
  void add_header(std::string_view, std::string_view) override {}
  void send(unsigned status, std::string_view, std::string body) override {
    ++answers;
    check(status, body);
  }
  void begin_stream(unsigned, std::string_view) override { ++answers; }
  void write(std::string) override {}
  void end() override {}
  bool client_gone() const override { return false; }
  void on_client_gone(std::function<void()>) override {}

  static void check(unsigned status, const std::string& body) {
    FUZZ_CHECK(status >= 200 && status < 500);  // bad input is the caller's fault, never ours
    const auto message = nlohmann::json::parse(body);
    if (status >= 400) FUZZ_CHECK(message.at("detail").is_string());
    if (message.contains("worker_id")) FUZZ_CHECK(message["worker_id"].get<std::uint64_t>() < 3);
  }

  int answers = 0;
};

}  // namespace

void fuzz_one(std::string_view input) {
  static Site* const site = new Site;
  Reader in(input);
  const Call call = kCalls[in.byte() % kCalls.size()];
  HttpRequest request;
  request.method = call.method;
  request.path = call.path ? std::string(call.path) : std::string(in.rest());
  request.body = std::string(in.rest());
  if (request.path == "/route") {
    const auto reply = std::make_shared<Reply>();
    answer_route(site->router, site->fleet, site->tokenizer, request, reply);
    FUZZ_CHECK(reply->answers == 1);
    return;
  }
  const bool registry = request.path.starts_with("/workers");
  const ApiAnswer answer = registry ? answer_registry_request(site->router, site->fleet, request)
                                    : answer_router_request(site->router, request);
  Reply::check(answer.status, answer.body);
}

}  // namespace kvrouter::fuzz
