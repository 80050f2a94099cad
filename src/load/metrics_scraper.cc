#include "load/metrics_scraper.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <thread>

#include "net/upstream.h"

namespace kvrouter {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr std::size_t kMaxPage = 8 * 1024 * 1024;

// Asks one worker again and again.  Each step holds it alive; it ends at the next one after close().
class Target : public std::enable_shared_from_this<Target> {
 public:
  Target(asio::io_context& io, WorkerId worker, const MetricsSource& source, const MetricsScraper::Options& options)
      : worker_(worker),
        engine_(source.engine),
        options_(options),
        timer_(io),
        pool_(io, parse_worker_url(source.url), limits(options), options.tls) {}

  void schedule() {
    timer_.expires_after(options_.interval);
    timer_.async_wait([this, self = shared_from_this()](error_code error) {
      if (error || closed_) return;
      options_.wanted(worker_) ? ask() : schedule();
    });
  }

  void close() {
    closed_ = true;
    timer_.cancel();
    if (call_) call_->cancel();
  }

 private:
  static UpstreamLimits limits(const MetricsScraper::Options& options) {
    UpstreamLimits limits;
    limits.max_collected = kMaxPage;
    limits.max_idle = 1;
    limits.keep_idle = std::min(limits.keep_idle, 2 * options.interval);
    return limits;
  }

  void ask() {
    call_ =
        pool_.get("/metrics", options_.timeout, [this, self = shared_from_this()](unsigned status, const auto& body) {
          if (closed_) return;
          if (status == 0) return finish({{}, "no answer: " + body});
          if (status != 200) return finish({{}, "answered with status " + std::to_string(status)});
          finish(parse_load_metrics(body, engine_));
        });
    timer_.expires_after(options_.timeout);  // for the whole of it, however it comes
    timer_.async_wait([this, self = shared_from_this()](error_code error) {
      if (error || closed_ || !call_) return;
      call_->cancel();
      finish({{}, "no whole answer in time"});
    });
  }

  void finish(const LoadOrError& result) {
    call_ = nullptr;
    options_.on_load(worker_, result);
    schedule();
  }

  bool closed_ = false;
  WorkerId worker_;
  std::optional<unsigned> engine_;
  const MetricsScraper::Options& options_;
  asio::steady_timer timer_;
  UpstreamPool pool_;
  std::shared_ptr<UpstreamCall> call_;
};

}  // namespace

class MetricsScraper::Impl {
 public:
  Impl(const std::vector<MetricsSource>& sources, Options options) : options_(std::move(options)) {
    targets_.resize(sources.size());
    for (std::size_t i = 0; i < sources.size(); ++i) replace(static_cast<WorkerId>(i), sources[i]);
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Impl() {
    io_.stop();
    thread_.join();
    targets_.clear();  // their sockets and timers go before the context that they belong to
  }
  void set(WorkerId worker, const MetricsSource& source) {
    asio::post(io_, [this, worker, source] { replace(worker, source); });
  }

 private:
  void replace(WorkerId worker, const MetricsSource& source) {
    if (targets_[worker]) targets_[worker]->close();
    targets_[worker] = source.url.empty() ? nullptr : std::make_shared<Target>(io_, worker, source, options_);
    if (targets_[worker]) targets_[worker]->schedule();
  }

  Options options_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{io_.get_executor()};
  std::vector<std::shared_ptr<Target>> targets_;
  std::thread thread_;
};

MetricsScraper::MetricsScraper(const std::vector<MetricsSource>& sources, Options options)
    : impl_(std::make_unique<Impl>(sources, std::move(options))) {}
MetricsScraper::~MetricsScraper() = default;
void MetricsScraper::set(WorkerId worker, const MetricsSource& source) {
  impl_->set(worker, source);
}

}  // namespace kvrouter
