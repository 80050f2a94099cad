#include "sim/fleet.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <queue>
#include <random>
#include <stdexcept>

#include "events/kv_event_stream.h"
#include "index/index_sink.h"
#include "kvrouter/router.h"
#include "sim/event_publisher.h"

namespace kvrouter::sim {
namespace {

using RequestId = std::int64_t;

struct Job final : Request {
  Job(std::vector<Token> prompt, std::int32_t max_new_tokens, RequestId request_id)
      : Request(std::move(prompt), max_new_tokens, static_cast<std::uint64_t>(request_id)), id(request_id) {}
  RequestId id;
};

// What happens at a moment; ties are broken by the order in which things were planned.
struct Event {
  enum class Kind : std::uint8_t { kArrival, kEnqueue, kStepEnd, kKvEvents, kLoad };
  double time;
  std::uint64_t order;
  Kind kind;
  std::uint32_t worker;
  std::int64_t item;  // request, or slot of a payload

  bool operator>(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
};

double quantile(std::vector<double>& values, double q) {
  if (values.empty()) return 0;
  const auto at = static_cast<std::ptrdiff_t>(q * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<std::size_t>(at)];
}

void append_segment(const Segment& segment, Token vocab_size, std::vector<Token>& out) {
  std::uint64_t state = segment.seed * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
  for (std::int32_t i = 0; i < segment.length; ++i) {
    state += 0x9E3779B97F4A7C15ull;
    std::uint64_t x = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    out.push_back(kFirstPlainToken + static_cast<Token>((x >> 32) % (vocab_size - kFirstPlainToken)));
  }
}

class Fleet {
 public:
  Fleet(const FleetOptions& options, const std::vector<FleetRequest>& requests)
      : options_(options), requests_(requests), states_(requests.size()), router_(router_options()) {
    check();
    for (std::int32_t w = 0; w < options.num_workers; ++w) {
      workers_.push_back(std::make_unique<Worker>(options, router_, static_cast<WorkerId>(w)));
    }
    followers_.resize(requests.size());
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (requests[i].follows >= 0) followers_[static_cast<std::size_t>(requests[i].follows)].push_back(i);
    }
  }

  FleetResult run() {
    if (options_.users > 0) {
      for (std::int32_t i = 0; i < options_.users; ++i) send_next();
    } else {
      for (std::size_t i = 0; i < requests_.size(); ++i) {
        if (requests_[i].follows < 0) plan(requests_[i].arrival, Event::Kind::kArrival, 0, static_cast<RequestId>(i));
      }
    }
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      now_ = event.time;
      handle(event);
    }
    return result();
  }

 private:
  struct Worker {
    Worker(const FleetOptions& options, Router& router, WorkerId id)
        : scheduler(options.scheduler, options.blocks),
          sink(router.index(), id),
          stream(static_cast<std::size_t>(options.blocks.block_size), sink) {}
    Scheduler scheduler;
    IndexSink sink;
    KvEventStream stream;
    std::uint64_t next_batch = 0;
    bool busy = false;
    double last_load = -1e18;
    double tokens = 0;
  };
  struct State {
    double arrived = 0;
    double first_token = -1;
    double finished = -1;
    WorkerId worker = 0;
    Ticket ticket = 0;
    std::vector<Token> prompt;  // between arrival and the worker's queue
    std::vector<Token> whole;   // prompt and output, for those that follow
    std::size_t followers_left = 0;
  };
  struct Payload {
    std::string bytes;
    std::uint64_t sequence = 0;
    WorkerLoad load;
  };

  RouterOptions router_options() {
    RouterOptions options;
    options.block_size = static_cast<std::size_t>(options_.blocks.block_size);
    options.workers.resize(static_cast<std::size_t>(std::max(options_.num_workers, 0)));
    options.policy = options_.policy;
    options.seed = options_.seed;
    options.clock = [this] { return now_; };
    return options;
  }

  void check() const {
    const auto require = [](bool condition, const std::string& message) {
      if (!condition) throw std::invalid_argument(message);
    };
    require(options_.slowdown.empty() || options_.slowdown.size() == static_cast<std::size_t>(options_.num_workers),
            "slowdown must have one entry a worker");
    require(options_.load_loss >= 0 && options_.load_loss <= 1, "load_loss must be from 0 to 1");
    require(options_.event_delay >= 0 && options_.load_delay >= 0 && options_.network_delay >= 0,
            "event_delay, load_delay and network_delay must not be negative");
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      const FleetRequest& request = requests_[i];
      const std::string name = "request " + std::to_string(i);
      require(request.arrival >= 0, name + ": arrival must not be negative");
      require(request.follows < static_cast<std::int64_t>(i), name + ": follows must be an earlier request");
      require(options_.users == 0 || request.follows < 0, name + ": users send requests that follow none");
      for (const Segment& segment : request.segments) {
        require(segment.length >= 0, name + ": segment lengths must not be negative");
      }
    }
  }

  void plan(double time, Event::Kind kind, WorkerId worker, std::int64_t item) {
    events_.push({time, order_++, kind, worker, item});
  }

  void send_next() {
    if (next_ < requests_.size()) plan(now_, Event::Kind::kArrival, 0, static_cast<RequestId>(next_++));
  }

  void handle(const Event& event) {
    switch (event.kind) {
      case Event::Kind::kArrival:
        return on_arrival(event);
      case Event::Kind::kEnqueue:
        return on_enqueue(event.item);
      case Event::Kind::kStepEnd:
        return on_step_end(event.worker);
      case Event::Kind::kKvEvents: {
        Payload& payload = payloads_[static_cast<std::size_t>(event.item)];
        workers_[event.worker]->stream.on_batch(payload.sequence, std::as_bytes(std::span(payload.bytes)));
        free_payloads_.push_back(static_cast<std::size_t>(event.item));
        return;
      }
      case Event::Kind::kLoad:
        router_.loads().update(event.worker, payloads_[static_cast<std::size_t>(event.item)].load);
        free_payloads_.push_back(static_cast<std::size_t>(event.item));
        return;
    }
  }

  // --- clients ---

  void on_arrival(const Event& event) {
    batch_.assign(1, event.item);
    while (options_.batches && options_.users == 0 && !events_.empty() && events_.top().time == now_ &&
           events_.top().kind == Event::Kind::kArrival) {
      batch_.push_back(events_.top().item);
      events_.pop();
    }
    for (const RequestId id : batch_) prepare(id);
    if (batch_.size() == 1) {
      State& state = states_[static_cast<std::size_t>(batch_[0])];
      hash(state.prompt, hashes_);
      send(batch_[0], router_.choose(hashes_, state.prompt.size()));
      return;
    }
    std::size_t num_blocks = 0;
    for (const RequestId id : batch_) num_blocks += blocks_of(id);
    hashes_.resize(num_blocks);
    std::vector<BatchRequest> requests;
    std::span<LocalHash> rest = hashes_;
    for (const RequestId id : batch_) {
      const State& state = states_[static_cast<std::size_t>(id)];
      const std::span<LocalHash> blocks = rest.first(blocks_of(id));
      rest = rest.subspan(blocks.size());
      hash_blocks(state.prompt, block_size(), 0, blocks);
      requests.push_back({blocks, state.prompt.size(), requests_[static_cast<std::size_t>(id)].expected_output});
    }
    choices_.resize(batch_.size());
    router_.choose_batch(requests, choices_);
    for (std::size_t i = 0; i < batch_.size(); ++i) send(batch_[i], choices_[i]);
  }

  void prepare(RequestId id) {
    const FleetRequest& request = requests_[static_cast<std::size_t>(id)];
    State& state = states_[static_cast<std::size_t>(id)];
    state.arrived = now_;
    state.followers_left = followers_[static_cast<std::size_t>(id)].size();
    if (request.follows >= 0) {
      State& before = states_[static_cast<std::size_t>(request.follows)];
      if (--before.followers_left == 0) {
        state.prompt = std::move(before.whole);
      } else {
        state.prompt = before.whole;
      }
    }
    for (const Segment& segment : request.segments) {
      append_segment(segment, options_.scheduler.vocab_size, state.prompt);
    }
    const std::int64_t length = static_cast<std::int64_t>(state.prompt.size());
    if (const char* refusal = workers_.front()->scheduler.refusal(length, request.output_tokens)) {
      throw std::invalid_argument("request " + std::to_string(id) + " (" + std::to_string(length) + " tokens, " +
                                  std::to_string(request.output_tokens) + " to generate): " + refusal + " (" +
                                  std::to_string(options_.scheduler.max_model_len) + "; the cache has num_blocks " +
                                  std::to_string(options_.blocks.num_blocks) + ")");
    }
  }

  std::size_t block_size() const { return static_cast<std::size_t>(options_.blocks.block_size); }
  std::size_t blocks_of(RequestId id) const {
    return states_[static_cast<std::size_t>(id)].prompt.size() / block_size();
  }
  void hash(const std::vector<Token>& tokens, std::vector<LocalHash>& out) const {
    out.resize(tokens.size() / block_size());
    hash_blocks(tokens, block_size(), 0, out);
  }

  void send(RequestId id, const Choice& choice) {
    State& state = states_[static_cast<std::size_t>(id)];
    state.worker = choice.worker;
    state.ticket = choice.ticket;
    plan(now_ + options_.network_delay, Event::Kind::kEnqueue, choice.worker, id);
  }

  void on_finished(RequestId id, Job& job) {
    State& state = states_[static_cast<std::size_t>(id)];
    state.finished = now_;
    last_finish_ = now_;
    ++num_finished_;
    total_tokens_ += job.num_tokens();
    workers_[state.worker]->tokens += job.num_tokens();
    if (options_.feedback) router_.complete(state.ticket, {job.num_output_tokens(), 0});
    const std::vector<std::size_t>& followers = followers_[static_cast<std::size_t>(id)];
    if (!followers.empty()) state.whole = std::move(job.sequence.tokens);
    for (const std::size_t follower : followers) {
      plan(now_ + requests_[follower].arrival, Event::Kind::kArrival, 0, static_cast<RequestId>(follower));
    }
    if (options_.users > 0) send_next();
  }

  // --- workers ---

  void on_enqueue(RequestId id) {
    State& state = states_[static_cast<std::size_t>(id)];
    Worker& worker = *workers_[state.worker];
    worker.scheduler.add(
        std::make_shared<Job>(std::move(state.prompt), requests_[static_cast<std::size_t>(id)].output_tokens, id));
    if (!worker.busy) begin_step(state.worker);
  }

  void begin_step(WorkerId id) {
    Worker& worker = *workers_[id];
    worker.busy = worker.scheduler.has_work();
    if (!worker.busy) return;
    const StepWork work = worker.scheduler.begin_step();
    const double factor = options_.slowdown.empty() ? 1 : options_.slowdown[id];
    plan(now_ + factor * options_.time.seconds(work), Event::Kind::kStepEnd, id, 0);
    ++num_steps_;
  }

  void on_step_end(WorkerId id) {
    Worker& worker = *workers_[id];
    for (const auto& request : worker.scheduler.finish_step()) {
      Job& job = static_cast<Job&>(*request);
      State& state = states_[static_cast<std::size_t>(job.id)];
      if (state.first_token < 0) {
        state.first_token = now_;
        if (options_.feedback) router_.first_token(state.ticket);
      }
      if (job.finished) on_finished(job.id, job);
    }
    publish_events(id);
    publish_load(id);
    begin_step(id);
  }

  void publish_events(WorkerId id) {
    Worker& worker = *workers_[id];
    KvEvents& events = worker.scheduler.blocks().events();
    if (events.empty()) return;
    const std::size_t slot = new_payload();
    payloads_[slot].bytes = encode_batch(events, options_.blocks.block_size, now_, format_);
    payloads_[slot].sequence = worker.next_batch++;
    events.clear();
    plan(now_ + options_.event_delay, Event::Kind::kKvEvents, id, static_cast<std::int64_t>(slot));
  }

  void publish_load(WorkerId id) {
    Worker& worker = *workers_[id];
    if (now_ - worker.last_load < options_.load_interval && worker.scheduler.has_work()) return;
    worker.last_load = now_;
    if (options_.load_loss > 0 && std::uniform_real_distribution()(chance_) < options_.load_loss) return;
    const std::size_t slot = new_payload();
    const Scheduler& scheduler = worker.scheduler;
    payloads_[slot].load = {scheduler.kv_usage(), static_cast<std::int64_t>(scheduler.num_waiting()),
                            static_cast<std::int64_t>(scheduler.num_running())};
    plan(now_ + options_.load_delay, Event::Kind::kLoad, id, static_cast<std::int64_t>(slot));
  }

  std::size_t new_payload() {
    if (free_payloads_.empty()) {
      payloads_.emplace_back();
      return payloads_.size() - 1;
    }
    const std::size_t slot = free_payloads_.back();
    free_payloads_.pop_back();
    return slot;
  }

  FleetResult result() {
    FleetResult result;
    result.requests = num_finished_;
    result.steps = num_steps_;
    result.seconds = last_finish_;
    result.tokens_per_s = last_finish_ > 0 ? total_tokens_ / last_finish_ : 0;
    std::vector<double> ttft, latency;
    for (const State& state : states_) {
      if (state.finished < 0) continue;
      ttft.push_back(state.first_token - state.arrived);
      latency.push_back(state.finished - state.arrived);
    }
    result.ttft_p50_s = quantile(ttft, 0.5);
    result.ttft_p99_s = quantile(ttft, 0.99);
    result.latency_p99_s = quantile(latency, 0.99);
    double hits = 0, queries = 0, most = 0;
    for (const auto& worker : workers_) {
      const SchedulerCounters& counters = worker->scheduler.counters();
      hits += static_cast<double>(counters.prefix_cache_hits);
      queries += static_cast<double>(counters.prefix_cache_queries);
      result.preemptions += counters.preemptions;
      most = std::max(most, worker->tokens);
    }
    result.hit_rate = queries > 0 ? hits / queries : 0;
    result.imbalance = total_tokens_ > 0 ? most / total_tokens_ * static_cast<double>(workers_.size()) : 0;
    result.decision_p50_us = router_.status().decision_p50_us;
    return result;
  }

  const FleetOptions& options_;
  const std::vector<FleetRequest>& requests_;
  std::vector<State> states_;
  std::vector<std::vector<std::size_t>> followers_;
  double now_ = 0;
  Router router_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::uint64_t order_ = 0;
  std::deque<Payload> payloads_;
  std::vector<std::size_t> free_payloads_;
  const EventPublisherOptions format_;
  std::mt19937_64 chance_{options_.seed};
  std::size_t next_ = 0;  // of the users' list
  double last_finish_ = 0;
  double total_tokens_ = 0;
  std::int64_t num_finished_ = 0;
  std::int64_t num_steps_ = 0;

  // Scratch.
  std::vector<RequestId> batch_;
  std::vector<LocalHash> hashes_;
  std::vector<Choice> choices_;
};

}  // namespace

FleetResult run_fleet(const FleetOptions& options, const std::vector<FleetRequest>& requests) {
  return Fleet(options, requests).run();
}

}  // namespace kvrouter::sim
