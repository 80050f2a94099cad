#include "load/metrics_scraper.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
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

struct HostPort {
  std::string host;
  std::string port;
};

HostPort parse_url(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  const std::string what = "worker_urls: '" + url + "' is not of the form http://host:port";
  if (!std::string_view(url).starts_with(kScheme)) throw std::invalid_argument(what);
  std::string rest = url.substr(kScheme.size());
  if (!rest.empty() && rest.back() == '/') rest.pop_back();
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == rest.size() ||
      rest.find_first_not_of("0123456789", colon + 1) != std::string::npos || rest.find('/') != std::string::npos) {
    throw std::invalid_argument(what);
  }
  std::string host = rest.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {host, rest.substr(colon + 1)};
}

// Asks one worker again and again: wait -> resolve -> connect -> write -> read -> wait.
class Target {
 public:
  Target(asio::io_context& io, WorkerId worker, HostPort address, const MetricsScraper::Options& options)
      : worker_(worker), address_(std::move(address)), options_(options), timer_(io), resolver_(io), stream_(io) {}

  void schedule() {
    timer_.expires_after(options_.interval);
    timer_.async_wait([this](error_code error) {
      if (error) return;
      options_.wanted(worker_) ? resolve() : schedule();
    });
  }

 private:
  void resolve() {
    resolver_.async_resolve(address_.host, address_.port, [this](error_code error, auto endpoints) {
      if (error) return finish("cannot resolve " + address_.host);
      stream_.expires_after(options_.timeout);
      stream_.async_connect(endpoints, [this](error_code failed, auto&&) {
        if (failed) return finish("cannot connect: " + failed.message());
        write();
      });
    });
  }

  void write() {
    request_ = {http::verb::get, "/metrics", 11};
    request_.set(http::field::host, address_.host);
    request_.set(http::field::connection, "close");
    http::async_write(stream_, request_, [this](error_code error, std::size_t) {
      if (error) return finish("cannot send: " + error.message());
      buffer_.clear();
      parser_.emplace();
      parser_->body_limit(8 * 1024 * 1024);
      http::async_read(stream_, buffer_, *parser_, [this](error_code failed, std::size_t) {
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
    stream_.close();
    options_.on_load(worker_, result);
    schedule();
  }

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

void validate_worker_url(const std::string& url) {
  if (!url.empty()) parse_url(url);
}

class MetricsScraper::Impl {
 public:
  Impl(const std::vector<std::string>& urls, Options options) : options_(std::move(options)) {
    for (std::size_t i = 0; i < urls.size(); ++i) {
      if (urls[i].empty()) continue;
      targets_.push_back(std::make_unique<Target>(io_, static_cast<WorkerId>(i), parse_url(urls[i]), options_));
    }
    for (auto& target : targets_) target->schedule();
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Impl() {
    io_.stop();
    thread_.join();
  }

 private:
  Options options_;
  asio::io_context io_;
  std::vector<std::unique_ptr<Target>> targets_;
  std::thread thread_;
};

MetricsScraper::MetricsScraper(const std::vector<std::string>& urls, Options options)
    : impl_(std::make_unique<Impl>(urls, std::move(options))) {}
MetricsScraper::~MetricsScraper() = default;

}  // namespace kvrouter
