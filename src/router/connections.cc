#include "router/connections.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <future>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "load/metrics_scraper.h"
#include "router/worker_link.h"

namespace kvrouter {
namespace {

constexpr std::chrono::milliseconds kTick{50};

// libzmq takes a few descriptors a socket; the common soft limit of 1,024 is too low for a large fleet.
void raise_descriptor_limit(std::size_t num_workers) {
  rlimit limit{};
  const rlim_t wanted = 256 + 10 * static_cast<rlim_t>(num_workers);
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(wanted, limit.rlim_max);
  setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

class Connections::Impl {
 public:
  Impl(const Context& context, bool kv_events) : context_(context), kv_events_(kv_events) {
    const std::size_t n = context.options.workers.size();
    raise_descriptor_limit(n);
    // Two channels a worker, each a socket, its monitor, and the socket in which libzmq feeds the monitor, and one for
    // replays; closed ones linger.
    zmq_.set(zmq::ctxopt::max_sockets, static_cast<int>(16 * n + 16));
    const auto started = WorkerLink::Clock::now();
    std::vector<MetricsSource> sources;
    for (WorkerId w = 0; w < n; ++w) {
      try {
        links_.push_back(make_link(w, context.options.workers[w], started));
      } catch (const zmq::error_t& error) {
        throw std::runtime_error("cannot connect to worker " + std::to_string(w) + " (KV events '" +
                                 context.options.workers[w].kv_events + "', load '" + context.options.workers[w].load +
                                 "'): " + error.what() + "; check worker_addresses and the ports");
      }
      sources.push_back({context.options.workers[w].http, context.options.workers[w].engine});
    }
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_ < 0) throw std::runtime_error("eventfd: no file descriptors left (see ulimit -n)");
    scraper_ = std::make_unique<MetricsScraper>(
        sources, MetricsScraper::Options{.interval = context.options.metrics_interval,
                                         .wanted =
                                             [this](WorkerId w) {
                                               const std::shared_lock lock(context_.links_mutex);
                                               return links_[w]->wants_metrics();
                                             },
                                         .on_load =
                                             [this](WorkerId w, const LoadOrError& result) {
                                               const std::shared_lock lock(context_.links_mutex);
                                               links_[w]->on_metrics(result);
                                             },
                                         .tls = client_tls(context.options.ca_file)});
    thread_ = std::thread([this] { run(); });
  }

  ~Impl() {
    stop_ = true;
    wake();
    thread_.join();
    scraper_.reset();
    close(wake_);
  }

  void replace(WorkerId worker, const WorkerEndpoints& endpoints) {
    std::promise<void> done;
    {
      const std::lock_guard lock(replacement_mutex_);
      replacement_ = Replacement{worker, endpoints, &done};
    }
    wake();
    done.get_future().get();
    scraper_->set(worker, {endpoints.http, endpoints.engine});
  }

  std::optional<WorkerSnapshot> capture(WorkerId worker, const PrefixIndex& index) {
    Capture capture{worker, index, {}};
    {
      const std::lock_guard lock(replacement_mutex_);
      capture_ = &capture;
    }
    wake();
    return capture.done.get_future().get();
  }

  const WorkerLink& link(WorkerId worker) const { return *links_[worker]; }

 private:
  enum class Source { kKvEvents, kReplay, kLoad, kMonitor };
  struct Item {
    WorkerLink* link;
    Source source;
  };

  struct Replacement {
    WorkerId worker;
    WorkerEndpoints endpoints;
    std::promise<void>* done;
  };

  struct Capture {
    WorkerId worker;
    const PrefixIndex& index;
    std::promise<std::optional<WorkerSnapshot>> done;
  };

  // Between two events, so that index and stream are at the same place.
  void capture_if_asked() {
    Capture* asked = nullptr;
    {
      const std::lock_guard lock(replacement_mutex_);
      std::swap(asked, capture_);
    }
    if (!asked) return;
    try {
      asked->done.set_value(links_[asked->worker]->capture(asked->index));
    } catch (...) {  // no memory
      asked->done.set_exception(std::current_exception());
    }
  }

  std::unique_ptr<WorkerLink> make_link(WorkerId worker, const WorkerEndpoints& endpoints,
                                        WorkerLink::Clock::time_point started) {
    const std::size_t first_channel = std::exchange(next_channel_, next_channel_ + 2);
    auto link = std::make_unique<WorkerLink>(
        zmq_, worker, endpoints,
        WorkerLink::Context{context_.options, context_.sinks[worker], context_.loads, context_.notices,
                            context_.decisions[worker], kv_events_, first_channel, started});
    if (auto snapshot = context_.take_snapshot(endpoints); snapshot && !link->resume(std::move(*snapshot))) {
      context_.notices.post(
          Notice::Level::kWarning,
          "worker " + std::to_string(worker) +
              " replays no KV events: what the snapshot has of it cannot be confirmed, and is not used");
    }
    return link;
  }

  void wake() {
    const std::uint64_t one = 1;
    (void)!write(wake_, &one, sizeof one);
  }

  // On the network's thread, as ZMQ's sockets are not for two.
  void replace_if_asked(std::vector<zmq::pollitem_t>& polled, std::vector<Item>& items) {
    std::uint64_t count = 0;
    (void)!read(wake_, &count, sizeof count);
    std::optional<Replacement> asked;
    {
      const std::lock_guard lock(replacement_mutex_);
      asked.swap(replacement_);
    }
    if (!asked) return;
    try {
      std::unique_ptr<WorkerLink> link = make_link(asked->worker, asked->endpoints, WorkerLink::Clock::now());
      {
        const std::unique_lock lock(context_.links_mutex);
        links_[asked->worker].swap(link);
      }
      link.reset();
      // Before the new link applies anything: what it learns must not be wiped.
      context_.sinks[asked->worker].on_interrupted();
      list(polled, items);
      asked->done->set_value();
    } catch (const zmq::error_t& error) {
      asked->done->set_exception(std::make_exception_ptr(
          std::invalid_argument("worker " + std::to_string(asked->worker) + ": '" + asked->endpoints.kv_events +
                                "', '" + asked->endpoints.load + "': " + error.what())));
    }
  }

  // What is polled, and whose it is.
  void list(std::vector<zmq::pollitem_t>& polled, std::vector<Item>& items) {
    polled = {{nullptr, wake_, ZMQ_POLLIN, 0}};
    items = {{nullptr, Source::kMonitor}};
    const auto add = [&](WorkerLink* link, zmq::socket_t& socket, Source source) {
      polled.push_back({socket.handle(), 0, ZMQ_POLLIN, 0});
      items.push_back({link, source});
    };
    for (auto& link : links_) {
      // A worker's messages stand before its monitor's news: what arrived before a loss is applied before it.
      if (Channel* kv = link->kv_channel(); kv && link->takes_kv_events()) {
        add(link.get(), kv->socket(), Source::kKvEvents);
      }
      if (zmq::socket_t* replay = link->replay_socket()) add(link.get(), *replay, Source::kReplay);
      if (Channel* load = link->load_channel()) add(link.get(), load->socket(), Source::kLoad);
      if (Channel* kv = link->kv_channel()) add(link.get(), kv->monitor(), Source::kMonitor);
      if (Channel* load = link->load_channel()) add(link.get(), load->monitor(), Source::kMonitor);
    }
  }

  void run() {
    pthread_setname_np(pthread_self(), "kvrouter-net");
    std::vector<zmq::pollitem_t> polled;
    std::vector<Item> items;
    list(polled, items);
    auto next_tick = WorkerLink::Clock::now();
    while (!stop_) {
      try {
        bool changed = false;
        for (auto& link : links_) changed = link->polling_changed() || changed;
        if (changed) list(polled, items);
        zmq::poll(polled.data(), polled.size(), kTick);
        if (polled[0].revents & ZMQ_POLLIN) {
          replace_if_asked(polled, items);
          capture_if_asked();
          continue;
        }
        for (std::size_t i = 1; i < polled.size(); ++i) {
          if (polled[i].revents & ZMQ_POLLIN) serve(items[i]);
        }
        const auto now = WorkerLink::Clock::now();
        if (now >= next_tick) {
          next_tick = now + kTick;
          for (auto& link : links_) link->tick(now);
        }
      } catch (const std::exception& error) {  // one worker's trouble (or a signal) must not end the others' service
        if (stop_) return;
        context_.notices.post(Notice::Level::kError, std::string("in the network thread: ") + error.what());
      }
    }
  }

  static void serve(const Item& item) {
    switch (item.source) {
      case Source::kKvEvents:
        return item.link->read_kv_events();
      case Source::kReplay:
        return item.link->read_replay();
      case Source::kLoad:
        return item.link->read_load();
      case Source::kMonitor:
        return item.link->update_connections();
    }
  }

  Context context_;
  const bool kv_events_;
  zmq::context_t zmq_;
  std::vector<std::unique_ptr<WorkerLink>> links_;  // after zmq_: sockets close before their context does
  std::size_t next_channel_ = 0;  // never reused: libzmq frees a closed monitor's address only in its own time
  int wake_ = -1;
  std::atomic<bool> stop_{false};
  std::mutex replacement_mutex_;
  Capture* capture_ = nullptr;
  std::optional<Replacement> replacement_;  // one at a time: the router's lifecycle mutex sees to it
  std::unique_ptr<MetricsScraper> scraper_;
  std::thread thread_;
};

Connections::Connections(const Context& context, bool kv_events) : impl_(std::make_unique<Impl>(context, kv_events)) {}
Connections::~Connections() = default;

void Connections::replace(WorkerId worker, const WorkerEndpoints& endpoints) {
  impl_->replace(worker, endpoints);
}
std::optional<WorkerSnapshot> Connections::capture(WorkerId worker, const PrefixIndex& index) {
  return impl_->capture(worker, index);
}
WorkerState Connections::state(WorkerId worker) const {
  return impl_->link(worker).state();
}
bool Connections::hears_kv_events(WorkerId worker) const {
  return impl_->link(worker).hears_kv_events();
}
void Connections::describe(WorkerId worker, WorkerStatus& status) const {
  impl_->link(worker).describe(status);
}

}  // namespace kvrouter
