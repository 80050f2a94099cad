#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "kvrouter/worker_load.h"
#include "load/prometheus_text.h"

namespace kvrouter {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxQueue = 1'000'000'000;  // beyond it a count is a lie

LoadOrError failure(std::string what) {
  return {{}, std::move(what)};
}

bool read_count(const json& value, std::int64_t& out) {
  if (!value.is_number()) return false;
  const double number = value.get<double>();
  if (!(number >= 0 && number <= static_cast<double>(kMaxQueue)) || number != std::floor(number)) return false;
  out = static_cast<std::int64_t>(number);
  return true;
}

// "name{labels} value" or "name value", of one line; the value of a line about another metric, or without the label
// that is asked for, is not touched.
bool sample_of(std::string_view line, std::string_view name, std::string_view label, double& value) {
  if (!line.starts_with(name)) return false;
  line.remove_prefix(name.size());
  if (line.starts_with('{')) {
    const std::size_t end = line.rfind('}');
    if (end == std::string_view::npos) return false;
    if (!label.empty() && after_label(line.substr(1, end - 1), label) == std::string_view::npos) return false;
    line.remove_prefix(end + 1);
  } else if (!label.empty()) {
    return false;
  }
  if (!line.starts_with(' ')) return false;
  line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), value);
  return error == std::errc() && std::isfinite(value);
}

struct Sum {
  double total = 0;
  int samples = 0;

  void add(double value) {
    total += value;
    ++samples;
  }
};

}  // namespace

LoadOrError parse_load_message(std::string_view text) {
  const json message = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!message.is_object()) return failure("load message is not a JSON object");
  const auto usage = message.find("kv_cache_usage");
  const auto waiting = message.find("num_waiting_reqs");
  if (usage == message.end() || waiting == message.end()) {
    return failure("load message lacks kv_cache_usage or num_waiting_reqs");
  }
  LoadOrError result;
  if (!usage->is_number() || !(usage->get<double>() >= 0 && usage->get<double>() <= 1)) {
    return failure("kv_cache_usage is not a number from 0 to 1");
  }
  result.load.kv_usage = usage->get<double>();
  if (!read_count(*waiting, result.load.waiting)) return failure("num_waiting_reqs is not a count");
  const auto running = message.find("num_running_reqs");
  if (running != message.end() && !read_count(*running, result.load.running)) {
    return failure("num_running_reqs is not a count");
  }
  return result;
}

LoadOrError parse_load_metrics(std::string_view text, std::optional<unsigned> engine) {
  const std::string label = engine ? "engine=\"" + std::to_string(*engine) + "\"" : "";
  const auto is = [&](std::string_view line, std::string_view name, double& value) {
    return sample_of(line, name, label, value);
  };
  Sum usage, waiting, running;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    double value = 0;
    // The second name is what releases before 0.10 called it.
    if (is(line, "vllm:kv_cache_usage_perc", value) || is(line, "vllm:gpu_cache_usage_perc", value)) {
      usage.add(value);
    } else if (is(line, "vllm:num_requests_waiting", value)) {
      waiting.add(value);
    } else if (is(line, "vllm:num_requests_running", value)) {
      running.add(value);
    }
  }
  if (usage.samples == 0 || waiting.samples == 0) {
    return failure("/metrics has no vllm:kv_cache_usage_perc or vllm:num_requests_waiting" +
                   (engine ? " of engine " + std::to_string(*engine) : ""));
  }
  const double mean_usage = usage.total / usage.samples;
  const double limit = static_cast<double>(kMaxQueue);
  if (!(mean_usage >= 0 && mean_usage <= 1 && waiting.total >= 0 && waiting.total <= limit && running.total >= 0 &&
        running.total <= limit)) {
    return failure("/metrics has values out of range");
  }
  return {{mean_usage, static_cast<std::int64_t>(waiting.total), static_cast<std::int64_t>(running.total)}, {}};
}

}  // namespace kvrouter
