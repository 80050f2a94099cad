#include "sim/worker.h"

#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "server/http_server.h"
#include "sim/completions.h"
#include "sim/event_publisher.h"
#include "sim/worker_metrics.h"

namespace kvrouter::sim {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::chrono::seconds kIdleLoadInterval{1};
// A step's sleep is cut into slices, so that stop() and replay requests need not wait for a long step.
constexpr milliseconds kSlice{20};
// What the kernel's sleep is trusted with; zmq_poll counts in whole milliseconds.
constexpr milliseconds kPreciseSleep{2};
constexpr std::string_view kJson = "application/json";

double unix_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

struct ServedRequest final : Request {
  ServedRequest(CompletionRequest&& request, CompletionInfo completion_info, std::shared_ptr<HttpReply> http_reply)
      : Request(std::move(request.prompt), static_cast<std::int32_t>(request.max_tokens), request.seed),
        stream(request.stream),
        include_usage(request.include_usage),
        return_token_ids(request.return_token_ids),
        info(std::move(completion_info)),
        reply(std::move(http_reply)) {}

  Usage usage() const { return {num_prompt_tokens, num_output_tokens(), std::max(num_cached_tokens, 0)}; }

  bool stream;
  bool include_usage;
  bool return_token_ids;
  CompletionInfo info;
  std::shared_ptr<HttpReply> reply;
};

struct ResetCommand {
  bool reset_running;
  std::shared_ptr<HttpReply> reply;
};

// Wakes the engine thread out of its idle poll.
class WakeUp {
 public:
  WakeUp() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~WakeUp() { ::close(fd_); }
  WakeUp(const WakeUp&) = delete;
  WakeUp& operator=(const WakeUp&) = delete;
  int fd() const { return fd_; }
  // A full counter means that a wake-up is due anyway, an empty one that there is nothing to take back.
  void set() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd_, &one, sizeof(one));
  }
  void clear() {
    std::uint64_t count;
    [[maybe_unused]] const auto read = ::read(fd_, &count, sizeof(count));
  }

 private:
  int fd_;
};

}  // namespace

class Worker::Impl {
 public:
  explicit Impl(const WorkerOptions& options)
      : options_(options),
        scheduler_(options.scheduler, options.blocks),
        publisher_(zmq_, publisher_options(options), options.blocks.block_size),
        kv_events_endpoint_(publisher_.endpoint()),
        replay_endpoint_(publisher_.replay_endpoint()),
        model_json_(json_escaped(options.model)) {
    if (!options.load_endpoint.empty()) {
      load_ = zmq::socket_t(zmq_, zmq::socket_type::pub);
      load_.set(zmq::sockopt::linger, 0);
      load_endpoint_ = bind_socket(load_, options.load_endpoint, "load_endpoint");
    }
    try {
      http_ = std::make_unique<HttpServer>(options.host, options.port,
                                           [this](HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
                                             handle(std::move(request), std::move(reply));
                                           });
    } catch (const std::system_error& error) {
      throw std::runtime_error(std::string("port: ") + error.what());
    }
    engine_ = std::thread([this] { run(); });
  }

  ~Impl() { stop(); }

  void stop() {
    std::lock_guard lock(stop_mutex_);
    stopping_ = true;
    wake_.set();
    if (engine_.joinable()) engine_.join();
    http_->stop();
    // Bound addresses are free once the sockets are closed, not only when the object goes.
    publisher_ = EventPublisher(zmq_, {}, options_.blocks.block_size);
    load_.close();
  }

  std::uint16_t port() const { return http_->port(); }

  const std::string& kv_events_endpoint() const { return kv_events_endpoint_; }
  const std::string& replay_endpoint() const { return replay_endpoint_; }
  const std::string& load_endpoint() const { return load_endpoint_; }

 private:
  static EventPublisherOptions publisher_options(const WorkerOptions& options) {
    return {options.kv_events_endpoint, options.replay_endpoint, options.topic,
            options.replay_buffer,      options.array_events,    options.byte_hashes};
  }

  // ---- on the HTTP server's thread

  void handle(HttpRequest&& request, std::shared_ptr<HttpReply> reply) {
    const auto only = [&](std::string_view method) {
      if (request.method == method) return true;
      reply->send(405, kJson, "{\"detail\":\"Method Not Allowed\"}");
      return false;
    };
    if (request.path == "/v1/completions") {
      if (only("POST")) complete(request.body, std::move(reply));
    } else if (request.path == "/tokenize") {
      if (!only("POST")) return;
      const TokenizeAnswer answer = answer_tokenize(request.body, options_.scheduler.vocab_size);
      reply->send(answer.status, kJson, answer.body);
    } else if (request.path == "/health") {
      if (only("GET")) reply->send(200, kJson, "");
    } else if (request.path == "/metrics") {
      if (only("GET")) {
        reply->send(200, "text/plain; version=0.0.4; charset=utf-8",
                    metrics_page(stats(), options_.model, options_.blocks.block_size, options_.blocks.num_blocks));
      }
    } else if (request.path == "/v1/models") {
      if (only("GET")) reply->send(200, kJson, models_json());
    } else if (request.path == "/reset_prefix_cache") {
      if (!only("POST")) return;
      const bool reset_running = request.query.find("reset_running_requests=true") != std::string::npos;
      std::lock_guard lock(inbox_mutex_);
      resets_.push_back({reset_running, std::move(reply)});
      wake_.set();
    } else if (options_.debug && request.path == "/debug/blocks") {
      if (!only("GET")) return;
      std::lock_guard lock(inbox_mutex_);
      lookers_.push_back(std::move(reply));
      wake_.set();
    } else {
      reply->send(404, kJson, "{\"detail\":\"Not Found\"}");
    }
  }

  void complete(const std::string& body, std::shared_ptr<HttpReply> reply) {
    CompletionRequest completion;
    ApiError error = parse_completion(body, options_.model, options_.scheduler.vocab_size, completion);
    if (!error.status) {
      const auto length = static_cast<std::int64_t>(completion.prompt.size());
      if (const char* refusal = scheduler_.refusal(length, completion.max_tokens)) {
        error = {400, std::string(refusal) + ": " + std::to_string(length) + " prompt tokens, max_tokens " +
                          std::to_string(completion.max_tokens) + ", max_model_len " +
                          std::to_string(options_.scheduler.max_model_len)};
      }
    }
    if (error.status) return reply->send(error.status, kJson, error_json(error));
    CompletionInfo info{"cmpl-" + std::to_string(next_id_++), model_json_, static_cast<std::int64_t>(unix_time())};
    auto request = std::make_shared<ServedRequest>(std::move(completion), std::move(info), std::move(reply));
    std::lock_guard lock(inbox_mutex_);
    inbox_.push_back(std::move(request));
    wake_.set();
  }

  std::string models_json() const {
    return "{\"object\":\"list\",\"data\":[{\"id\":\"" + model_json_ +
           "\",\"object\":\"model\",\"created\":" + std::to_string(static_cast<std::int64_t>(started_)) +
           ",\"owned_by\":\"kvrouter\",\"root\":\"" + model_json_ +
           "\",\"parent\":null,\"max_model_len\":" + std::to_string(options_.scheduler.max_model_len) + "}]}";
  }

  WorkerStats stats() {
    std::lock_guard lock(stats_mutex_);
    return stats_;
  }

  // ---- on the engine's thread

  void run() {
    // Signals are the process's business; here they would only interrupt the sockets' calls.
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
    publish_load();
    while (!stopping_) {
      take_inbox();
      drop_gone_clients();
      publisher_.serve_replay();
      if (!scheduler_.has_work()) {
        wait_idle();
        continue;
      }
      const auto start = Clock::now();
      const StepWork work = scheduler_.begin_step();
      const std::chrono::duration<double> duration(options_.time.seconds(work));
      if (!sleep_until(start + std::chrono::duration_cast<Clock::duration>(duration))) return;
      for (const auto& request : scheduler_.finish_step()) deliver(static_cast<ServedRequest&>(*request));
      publish_events();
      publish_load();
    }
  }

  void take_inbox() {
    {
      std::lock_guard lock(inbox_mutex_);
      taken_.swap(inbox_);
      taken_resets_.swap(resets_);
      taken_lookers_.swap(lookers_);
    }
    for (const auto& reply : taken_lookers_) {
      const BlockPool::Held held = scheduler_.blocks().pool().held();
      reply->send(200, kJson, held_blocks_json(held, publisher_.next_sequence()));
    }
    taken_lookers_.clear();
    for (ResetCommand& reset : taken_resets_) {
      const bool done = scheduler_.reset_prefix_cache(reset.reset_running);
      reset.reply->send(200, kJson, done ? "{\"success\":true}" : "{\"success\":false}");
    }
    for (auto& request : taken_) {
      if (request->stream) request->reply->begin_stream(200, "text/event-stream; charset=utf-8");
      scheduler_.add(std::move(request));
    }
    taken_.clear();
    taken_resets_.clear();
  }

  void drop_gone_clients() {
    gone_.clear();
    const auto note = [&](const std::shared_ptr<Request>& request) {
      if (static_cast<ServedRequest&>(*request).reply->client_gone()) gone_.push_back(request);
    };
    std::for_each(scheduler_.running().begin(), scheduler_.running().end(), note);
    std::for_each(scheduler_.waiting().begin(), scheduler_.waiting().end(), note);
    for (const auto& request : gone_) scheduler_.cancel(*request);
    if (!gone_.empty()) publish_load();
    gone_.clear();
  }

  void deliver(ServedRequest& request) {
    if (!request.stream) {
      if (!request.finished) return;
      const auto& tokens = request.sequence.tokens;
      const std::span<const Token> output(tokens.data() + request.num_prompt_tokens,
                                          static_cast<std::size_t>(request.num_output_tokens()));
      std::vector<Token> prompt;
      if (request.return_token_ids) prompt.assign(tokens.begin(), tokens.begin() + request.num_prompt_tokens);
      request.reply->send(
          200, kJson,
          completion_json(request.info, output, request.return_token_ids ? &prompt : nullptr, request.usage()));
      return;
    }
    const bool first = request.num_output_tokens() == 1;
    std::span<const Token> prompt;
    if (first) prompt = {request.sequence.tokens.data(), static_cast<std::size_t>(request.num_prompt_tokens)};
    request.reply->write(token_event(request.info, request.sequence.tokens.back(), first, request.finished,
                                     request.return_token_ids, prompt));
    if (!request.finished) return;
    if (request.include_usage) request.reply->write(usage_event(request.info, request.usage()));
    request.reply->write(std::string(kStreamEnd));
    request.reply->end();
  }

  void publish_events() {
    // Like vLLM's, events wait for the end of a step: a reset in between is told with the next batch.
    KvEvents& events = scheduler_.blocks().events();
    if (!events.empty()) publisher_.publish(events, unix_time());
    events.clear();
  }

  void publish_load() {
    last_load_ = Clock::now();
    WorkerStats now{scheduler_.kv_usage(), static_cast<std::int64_t>(scheduler_.num_waiting()),
                    static_cast<std::int64_t>(scheduler_.num_running()), scheduler_.counters()};
    {
      std::lock_guard lock(stats_mutex_);
      stats_ = now;
    }
    if (load_endpoint_.empty()) return;
    const std::string message = load_message(now);
    load_.send(zmq::buffer(message), zmq::send_flags::none);
  }

  void wait_idle() {
    const auto due = last_load_ + kIdleLoadInterval;
    const auto now = Clock::now();
    if (now >= due) return publish_load();
    poll(true, std::chrono::duration_cast<milliseconds>(due - now) + milliseconds(1));
  }

  // False when the worker stops meanwhile.
  bool sleep_until(Clock::time_point end) {
    while (!stopping_) {
      const auto left = end - Clock::now();
      if (left <= kPreciseSleep) {
        std::this_thread::sleep_until(end);
        return !stopping_;
      }
      poll(false, std::min(kSlice, std::chrono::duration_cast<milliseconds>(left - kPreciseSleep / 2)));
      publisher_.serve_replay();
    }
    return false;
  }

  void poll(bool for_inbox, milliseconds timeout) {
    std::vector<zmq::pollitem_t>& items = poll_items_;
    items.clear();
    if (for_inbox) items.push_back({nullptr, wake_.fd(), ZMQ_POLLIN, 0});
    if (void* replay = publisher_.replay_handle()) items.push_back({replay, 0, ZMQ_POLLIN, 0});
    zmq::poll(items, timeout);
    if (for_inbox) wake_.clear();
  }

  const WorkerOptions options_;
  const double started_ = unix_time();
  Scheduler scheduler_;
  zmq::context_t zmq_{1};
  EventPublisher publisher_;
  zmq::socket_t load_;
  const std::string kv_events_endpoint_;
  const std::string replay_endpoint_;
  std::string load_endpoint_;
  const std::string model_json_;
  Clock::time_point last_load_;

  WakeUp wake_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> next_id_{0};
  std::mutex inbox_mutex_;
  std::vector<std::shared_ptr<ServedRequest>> inbox_;
  std::vector<ResetCommand> resets_;
  std::vector<std::shared_ptr<HttpReply>> lookers_;  // at /debug/blocks
  std::mutex stats_mutex_;
  WorkerStats stats_;
  std::mutex stop_mutex_;

  // Scratch of the engine's thread.
  std::vector<std::shared_ptr<ServedRequest>> taken_;
  std::vector<ResetCommand> taken_resets_;
  std::vector<std::shared_ptr<HttpReply>> taken_lookers_;
  std::vector<std::shared_ptr<Request>> gone_;
  std::vector<zmq::pollitem_t> poll_items_;

  std::unique_ptr<HttpServer> http_;
  std::thread engine_;
};

Worker::Worker(const WorkerOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Worker::~Worker() = default;
std::uint16_t Worker::port() const {
  return impl_->port();
}
const std::string& Worker::kv_events_endpoint() const {
  return impl_->kv_events_endpoint();
}
const std::string& Worker::replay_endpoint() const {
  return impl_->replay_endpoint();
}
const std::string& Worker::load_endpoint() const {
  return impl_->load_endpoint();
}
void Worker::stop() {
  impl_->stop();
}

}  // namespace kvrouter::sim
