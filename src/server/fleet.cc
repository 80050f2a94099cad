#include "server/fleet.h"

#include <algorithm>
#include <stdexcept>

#include "server/worker_details.h"

namespace kvrouter {
namespace {

std::string trimmed_url(std::string_view url) {
  while (url.ends_with('/')) url.remove_suffix(1);
  return std::string(url);
}

}  // namespace

Fleet::Fleet(boost::asio::io_context& io, Router& router, FleetOptions options)
    : io_(io), router_(router), options_(options), timer_(io) {
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
  const std::string url = trimmed_url(spec.url);
  if (find(url)) return {0, "there is a worker at " + url + " already"};
  const auto slot = std::find_if(workers_.begin(), workers_.end(), [](auto& w) { return !w.present; });
  if (slot == workers_.end()) {
    return {0, "there are " + std::to_string(workers_.size()) + " workers already: raise --max-workers"};
  }
  const auto id = static_cast<WorkerId>(slot - workers_.begin());
  try {
    HostPort address = parse_worker_url(url);
    router_.set_worker(id, {spec.kv_events, spec.load, url, spec.replay});
    FleetWorker worker(options_.breaker);
    worker.spec = spec;
    worker.spec.url = url;
    worker.pool = std::make_unique<UpstreamPool>(io_, std::move(address), options_.upstream);
    worker.generation = ++last_generation_;
    worker.present = true;
    workers_[id] = std::move(worker);
  } catch (const std::exception& error) {
    return {0, error.what()};
  }
  router_.enable(id, true);
  probe_health(id);
  return {id, {}};
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
        entry.healthy = status == 200;
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
          const WorkerCounters counters = parse_worker_counters(body);
          FleetWorker& entry = workers_[worker];
          entry.block_size = counters.block_size;
          entry.cache_queries = counters.cache_queries;
          entry.cache_hits = counters.cache_hits;
        });
  }
}

}  // namespace kvrouter
