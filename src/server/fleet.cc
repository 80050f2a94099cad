#include "server/fleet.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "server/worker_details.h"

namespace kvrouter {
namespace {

std::string trimmed_url(std::string_view url) {
  while (url.ends_with('/')) url.remove_suffix(1);
  return std::string(url);
}

}  // namespace

std::string endpoint_of_rank(const std::string& endpoint, unsigned rank) {
  if (endpoint.empty() || rank == 0) return endpoint;
  if (endpoint.starts_with("inproc://")) return endpoint + "_dp" + std::to_string(rank);
  const std::size_t colon = endpoint.rfind(':');
  unsigned port = 0;
  const char* end = endpoint.data() + endpoint.size();
  const auto [last, error] = std::from_chars(endpoint.data() + colon + 1, end, port);
  if (!endpoint.starts_with("tcp://") || error != std::errc() || last != end || port == 0 || port + rank > 65535) {
    throw std::invalid_argument("'" + endpoint + "' has no port that the rank " + std::to_string(rank) +
                                " can be added to: give tcp://host:port");
  }
  return endpoint.substr(0, colon + 1) + std::to_string(port + rank);
}

Fleet::Fleet(boost::asio::io_context& io, Router& router, FleetOptions options)
    : io_(io), router_(router), options_(std::move(options)), tls_(client_tls(options_.ca_file)), timer_(io) {
  workers_.reserve(router.num_workers());
  for (WorkerId w = 0; w < router.num_workers(); ++w) {
    workers_.emplace_back(options_.breaker);
    router_.enable(w, false);
  }
  tick();
}

void Fleet::stop() {
  stopped_ = true;
  timer_.cancel();
  for (auto* calls : {&health_calls_, &model_calls_, &metrics_calls_}) {
    for (auto& [worker, call] : *calls) call->cancel();
    calls->clear();
  }
  for (FleetWorker& worker : workers_) worker.pool.reset();
}

Fleet::Added Fleet::add(const WorkerSpec& spec) {
  WorkerSpec wanted = spec;
  wanted.url = trimmed_url(spec.url);
  if (find(wanted.url)) return {{}, "there is a worker at " + wanted.url + " already"};
  if (spec.data_parallel_size > kMaxDataParallelSize) {
    return {{}, "data_parallel_size must be at most " + std::to_string(kMaxDataParallelSize)};
  }
  const unsigned engines = std::max(1u, spec.data_parallel_size);
  std::vector<WorkerId> free;
  for (WorkerId w = 0; w < workers_.size() && free.size() < engines; ++w) {
    if (!workers_[w].present) free.push_back(w);
  }
  if (free.size() < engines) {
    return {{}, "there is room for " + std::to_string(workers_.size()) + " workers only: raise --max-workers"};
  }
  Added added;
  try {
    const HostPort address = parse_worker_url(wanted.url);
    for (unsigned rank = 0; rank < engines; ++rank) {
      WorkerSpec engine = wanted;
      if (spec.data_parallel_size == 0) {
        add_engine(free[rank], engine, address, std::nullopt);
      } else {
        for (std::string* endpoint : {&engine.kv_events, &engine.replay, &engine.load}) {
          *endpoint = endpoint_of_rank(*endpoint, rank);
        }
        add_engine(free[rank], engine, address, rank);
      }
      added.workers.push_back(free[rank]);
    }
  } catch (const std::exception& error) {
    for (const WorkerId worker : added.workers) remove(worker);
    return {{}, error.what()};
  }
  return added;
}

void Fleet::add_engine(WorkerId id, const WorkerSpec& spec, const HostPort& address, std::optional<unsigned> rank) {
  router_.set_worker(id, {spec.kv_events, spec.load, spec.url, spec.replay, rank});
  FleetWorker worker(options_.breaker);
  worker.spec = spec;
  worker.rank = rank;
  worker.pool = std::make_unique<UpstreamPool>(io_, address, options_.upstream, tls_);
  worker.generation = ++last_generation_;
  worker.present = true;
  workers_[id] = std::move(worker);
  router_.enable(id, true);
  probe_health(id);
}

bool Fleet::remove(WorkerId worker) {
  if (!set_draining(worker, true)) return false;
  workers_[worker].spec.url.clear();  // another may take its place at that address
  free_if_done(worker);
  changed();
  return true;
}

bool Fleet::set_draining(WorkerId worker, bool draining) {
  if (worker >= workers_.size() || !workers_[worker].present || workers_[worker].spec.url.empty()) return false;
  workers_[worker].draining = draining;
  router_.enable(worker, !draining);
  changed();
  return true;
}

std::optional<WorkerId> Fleet::find(std::string_view url) const {
  for (WorkerId w = 0; w < workers_.size(); ++w) {
    if (workers_[w].present && workers_[w].spec.url == url) return w;
  }
  return std::nullopt;
}

Fleet::Availability Fleet::eligible(std::string_view model, std::optional<WorkerId> excluded,
                                    std::vector<std::uint8_t>& out) const {
  const auto now = Clock::now();
  out.assign(workers_.size(), 0);
  bool some = false, full = false, serving = false, unknown = false;
  for (WorkerId w = 0; w < workers_.size(); ++w) {
    const FleetWorker& worker = workers_[w];
    if (!worker.present) continue;
    if (!worker.models_known) unknown = true;
    const bool serves = model.empty() || std::any_of(worker.models.begin(), worker.models.end(),
                                                     [&](const ServedModel& m) { return m.id == model; });
    if (!serves) continue;
    serving = true;
    if (worker.draining || !worker.healthy || w == excluded || !worker.breaker.may_send(now)) continue;
    if (worker.in_flight >= options_.max_concurrency) {
      full = true;
      continue;
    }
    out[w] = 1;
    some = true;
  }
  if (some) return Availability::kSome;
  if (full) return Availability::kFull;
  return serving || unknown ? Availability::kDown : Availability::kUnknownModel;
}

bool Fleet::is_adapter(std::string_view model) const {
  for (const FleetWorker& worker : workers_) {
    if (!worker.present) continue;
    for (const ServedModel& served : worker.models) {
      if (served.id == model) return served.adapter;
    }
  }
  return false;
}

bool Fleet::any_healthy() const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [](const FleetWorker& w) { return w.present && w.healthy && !w.draining; });
}

void Fleet::begin_request(WorkerId worker) {
  ++workers_[worker].in_flight;
  ++workers_[worker].requests;
  workers_[worker].breaker.on_sent();
}

void Fleet::end_request(WorkerId worker, std::uint64_t generation, Outcome outcome) {
  if (!current(worker, generation)) return;
  FleetWorker& entry = workers_[worker];
  --entry.in_flight;
  switch (outcome) {
    case Outcome::kSuccess:
      entry.breaker.on_success();
      break;
    case Outcome::kError:
      ++entry.errors;
      entry.breaker.on_abandoned();
      break;
    case Outcome::kFailure:
      ++entry.errors;
      entry.breaker.on_failure(Clock::now());
      break;
    case Outcome::kAbandoned:
      entry.breaker.on_abandoned();
      break;
  }
  free_if_done(worker);
  changed();
}

bool Fleet::current(WorkerId worker, std::uint64_t generation) const {
  return workers_[worker].present && workers_[worker].generation == generation;
}

void Fleet::free_if_done(WorkerId worker) {
  FleetWorker& entry = workers_[worker];
  if (!entry.spec.url.empty() || entry.in_flight > 0) return;
  for (auto* calls : {&health_calls_, &model_calls_, &metrics_calls_}) {
    if (const auto call = calls->find(worker); call != calls->end()) call->second->cancel();
    calls->erase(worker);
  }
  entry = FleetWorker(options_.breaker);
  router_.set_worker(worker, {});
}

void Fleet::changed() {
  if (!stopped_ && on_change_) on_change_();
}

void Fleet::tick() {
  if (stopped_) return;
  const auto now = Clock::now();
  const bool details = now >= details_due_;
  if (details) details_due_ = now + options_.details_interval;
  for (WorkerId w = 0; w < workers_.size(); ++w) {
    if (!workers_[w].present || workers_[w].spec.url.empty()) continue;
    probe_health(w);
    if (details && workers_[w].healthy) probe_details(w);
  }
  changed();  // a breaker may be due for its trial
  timer_.expires_after(options_.health_interval);
  timer_.async_wait([this](boost::system::error_code error) {
    if (!error) tick();
  });
}

void Fleet::probe_health(WorkerId worker) {
  if (health_calls_.count(worker)) return;  // the last one is not answered yet
  health_calls_[worker] = workers_[worker].pool->get(
      "/health", options_.health_timeout,
      [this, worker, generation = workers_[worker].generation](unsigned status, const std::string& body) {
        health_calls_.erase(worker);
        if (stopped_ || !current(worker, generation)) return;
        FleetWorker& entry = workers_[worker];
        const bool was = entry.healthy;
        entry.unanswered_probes = status == 0 ? entry.unanswered_probes + 1 : 0;
        const bool perhaps_late = status == 0 && entry.unanswered_probes < options_.unanswered_probes;
        entry.healthy = status == 200 || (was && perhaps_late);
        entry.health_error = status == 200 ? "" : status == 0 ? body : "/health answers " + std::to_string(status);
        if (entry.healthy && (!was || !entry.models_known)) probe_details(worker);
        if (entry.healthy != was) changed();
      });
}

void Fleet::probe_details(WorkerId worker) {
  const std::uint64_t generation = workers_[worker].generation;
  if (!model_calls_.count(worker)) {
    model_calls_[worker] = workers_[worker].pool->get(
        "/v1/models", options_.health_timeout, [this, worker, generation](unsigned status, const std::string& body) {
          model_calls_.erase(worker);
          if (stopped_ || status != 200 || !current(worker, generation)) return;
          if (auto models = parse_models(body)) {
            workers_[worker].models = std::move(*models);
            workers_[worker].models_known = true;
            changed();
          }
        });
  }
  if (!metrics_calls_.count(worker)) {
    metrics_calls_[worker] = workers_[worker].pool->get(
        "/metrics", options_.health_timeout, [this, worker, generation](unsigned status, const std::string& body) {
          metrics_calls_.erase(worker);
          if (stopped_ || status != 200 || !current(worker, generation)) return;
          const WorkerCounters counters = parse_worker_counters(body, workers_[worker].rank);
          FleetWorker& entry = workers_[worker];
          entry.block_size = counters.block_size;
          entry.cache_queries = counters.cache_queries;
          entry.cache_hits = counters.cache_hits;
          check_hits(worker);
        });
  }
}

// For workers whose answers do not tell their hits: their counters, if all that they count came from here.
void Fleet::check_hits(WorkerId worker) {
  constexpr std::uint64_t kRequests = 64;
  FleetWorker& entry = workers_[worker];
  FleetWorker::Checked& last = entry.checked;
  const std::uint64_t requests = entry.expected.requests - last.totals.requests;
  const bool restarted = entry.cache_queries < last.queries || entry.cache_hits < last.totals.cached_tokens;
  if (requests < kRequests && !restarted) return;
  FleetWorker::Checked now{entry.expected, entry.cache_queries, entry.hit_reports};
  now.totals.cached_tokens = entry.cache_hits;
  const FleetWorker::Checked before = std::exchange(last, now);
  if (restarted || now.reports > before.reports) return;
  const double sent = static_cast<double>(now.totals.prompt_tokens - before.totals.prompt_tokens);
  const double counted = static_cast<double>(now.queries - before.queries);
  if (std::abs(sent - counted) > 0.1 * sent) return;
  router_.report_hits(worker, {requests, now.totals.prompt_tokens - before.totals.prompt_tokens,
                               now.totals.predicted_tokens - before.totals.predicted_tokens,
                               now.totals.cached_tokens - before.totals.cached_tokens});
}

}  // namespace kvrouter
