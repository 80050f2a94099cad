#include "load/metrics_scraper.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <optional>
#include <stdexcept>
#include <thread>

namespace kvrouter {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;

// Asks one worker again and again: wait -> resolve -> connect -> write -> read -> wait.  Each step holds it alive; it
// ends at the next one after close().
class Target : public std::enable_shared_from_this<Target> {
 public:
  Target(asio::io_context& io, WorkerId worker, HostPort address, const MetricsScraper::Options& options)
      : worker_(worker), address_(std::move(address)), options_(options), timer_(io), resolver_(io), stream_(io) {}

  void schedule() {
    timer_.expires_after(options_.interval);
    timer_.async_wait([this, self = shared_from_this()](error_code error) {
      if (error || closed_) return;
      options_.wanted(worker_) ? resolve() : schedule();
    });
  }

  void close() {
    closed_ = true;
    timer_.cancel();
    resolver_.cancel();
    stream_.close();
  }

 private:
  void resolve() {
    resolver_.async_resolve(
        address_.host, address_.port, [this, self = shared_from_this()](error_code error, auto endpoints) {
          if (closed_) return;
          if (error) return finish("cannot resolve " + address_.host);
          stream_.expires_after(options_.timeout);
          stream_.async_connect(endpoints, [this, self = shared_from_this()](error_code failed, auto&&) {
            if (failed) return finish("cannot connect: " + failed.message());
            write();
          });
        });
  }

  void write() {
    request_ = {http::verb::get, "/metrics", 11};
    request_.set(http::field::host, address_.host);
    request_.set(http::field::connection, "close");
    http::async_write(stream_, request_, [this, self = shared_from_this()](error_code error, std::size_t) {
      if (error) return finish("cannot send: " + error.message());
      buffer_.clear();
      parser_.emplace();
      parser_->body_limit(8 * 1024 * 1024);
      http::async_read(stream_, buffer_, *parser_, [this, self = shared_from_this()](error_code failed, std::size_t) {
        if (failed) return finish("no answer: " + failed.message());
        const auto& response = parser_->get();
        if (response.result() != http::status::ok) {
          return finish("answered with status " + std::to_string(response.result_int()));
        }
        finish(parse_load_metrics(response.body()));
      });
    });
  }

  void finish(std::string error) { finish(LoadOrError{{}, std::move(error)}); }
  void finish(const LoadOrError& result) {
    if (closed_) return;
    stream_.close();
    options_.on_load(worker_, result);
    schedule();
  }

  bool closed_ = false;
  WorkerId worker_;
  HostPort address_;
  const MetricsScraper::Options& options_;
  asio::steady_timer timer_;
  asio::ip::tcp::resolver resolver_;
  beast::tcp_stream stream_;
  http::request<http::empty_body> request_;
  beast::flat_buffer buffer_;
  std::optional<http::response_parser<http::string_body>> parser_;
};

}  // namespace

class MetricsScraper::Impl {
 public:
  Impl(const std::vector<std::string>& urls, Options options) : options_(std::move(options)) {
    targets_.resize(urls.size());
    for (std::size_t i = 0; i < urls.size(); ++i) replace(static_cast<WorkerId>(i), urls[i]);
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Impl() {
    io_.stop();
    thread_.join();
  }
  void set(WorkerId worker, const std::string& url) {
    asio::post(io_, [this, worker, url] { replace(worker, url); });
  }

 private:
  void replace(WorkerId worker, const std::string& url) {
    if (targets_[worker]) targets_[worker]->close();
    targets_[worker] = url.empty() ? nullptr : std::make_shared<Target>(io_, worker, parse_worker_url(url), options_);
    if (targets_[worker]) targets_[worker]->schedule();
  }

  Options options_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{io_.get_executor()};
  std::vector<std::shared_ptr<Target>> targets_;
  std::thread thread_;
};

MetricsScraper::MetricsScraper(const std::vector<std::string>& urls, Options options)
    : impl_(std::make_unique<Impl>(urls, std::move(options))) {}
MetricsScraper::~MetricsScraper() = default;
void MetricsScraper::set(WorkerId worker, const std::string& url) {
  impl_->set(worker, url);
}

}  // namespace kvrouter
