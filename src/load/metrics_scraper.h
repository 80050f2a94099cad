// Reads load from the /metrics page of workers that have no load publisher.
//
// One thread serves all workers.  A worker is asked every `interval`, as long as `wanted` says so for it, and never
// twice at once; an answer that takes longer than `timeout` or is larger than 8 MiB counts as a failure.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvrouter/worker_load.h"
#include "net/tls.h"
#include "net/worker_url.h"

namespace kvrouter {

struct MetricsSource {
  std::string url;                 // "http://host:port" or "https://host:port"; empty: none
  std::optional<unsigned> engine;  // whose samples count; none given: all engines' behind the page
};

class MetricsScraper {
 public:
  struct Options {
    std::chrono::milliseconds interval{250};
    std::chrono::milliseconds timeout{2000};
    // Called on the scraper's thread.
    std::function<bool(WorkerId)> wanted;
    std::function<void(WorkerId, const LoadOrError&)> on_load;
    std::shared_ptr<TlsContext> tls{};  // needed where a source's URL is https
  };

  // One source a worker.
  // REQUIRES: validate_worker_url() takes each URL.
  MetricsScraper(const std::vector<MetricsSource>& sources, Options options);
  // Another address for this worker, or none.
  // REQUIRES: as the constructor.
  void set(WorkerId worker, const MetricsSource& source);
  ~MetricsScraper();  // stops and joins
  MetricsScraper(const MetricsScraper&) = delete;
  MetricsScraper& operator=(const MetricsScraper&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvrouter
