// Workers' URLs and ZMQ endpoints, as callers of the registry give them.
#include "net/worker_url.h"

#include <stdexcept>
#include <string>

#include "fuzz.h"
#include "kvrouter/router.h"

namespace kvrouter::fuzz {

void fuzz_one(std::string_view input) {
  const std::string text(input);
  try {
    const HostPort address = parse_worker_url(text);
    FUZZ_CHECK(!address.host.empty());
    // They go into a request's head.
    FUZZ_CHECK(std::none_of(address.host.begin(), address.host.end(),
                            [](char c) { return static_cast<unsigned char>(c) <= ' ' || c == '\x7f'; }));
    FUZZ_CHECK(!address.port.empty() && address.port.size() <= 5);
    const unsigned long port = std::stoul(address.port);
    FUZZ_CHECK(port >= 1 && port <= 65535);
  } catch (const std::invalid_argument&) {
  }
  static Router* const router = [] {
    RouterOptions options;
    options.workers.resize(1);
    return new Router(options);
  }();
  for (const WorkerEndpoints& endpoints : {WorkerEndpoints{text, "", ""}, {"", text, ""}, {"", "", text}}) {
    try {
      router->set_worker(0, endpoints);
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace kvrouter::fuzz
