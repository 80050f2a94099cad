#include "server/worker_details.h"

#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "load/prometheus_text.h"
#include "server/json_body.h"

namespace kvrouter {
namespace {

constexpr std::size_t kMaxModels = 4096;

// The sample's value, after its name and labels.
double value_of(std::string_view line) {
  const std::size_t space = line.rfind(' ');
  if (space == std::string_view::npos) return 0;
  double value = 0;
  const auto [end, error] = std::from_chars(line.data() + space + 1, line.data() + line.size(), value);
  return error == std::errc() && std::isfinite(value) && value >= 0 && value < 1e18 ? value : 0;
}

bool is_sample_of(std::string_view line, std::string_view name) {
  return line.starts_with(name) && line.size() > name.size() && (line[name.size()] == '{' || line[name.size()] == ' ');
}

}  // namespace

std::optional<std::vector<ServedModel>> parse_models(std::string_view text) {
  const auto message = parse_json(text);
  if (!message.is_object() || !message.contains("data") || !message["data"].is_array()) return std::nullopt;
  std::vector<ServedModel> models;
  for (const auto& entry : message["data"]) {
    if (!entry.is_object() || models.size() == kMaxModels) continue;
    const auto id = entry.find("id");
    if (id == entry.end() || !id->is_string()) continue;
    const auto parent = entry.find("parent");
    models.push_back({id->get<std::string>(), parent != entry.end() && parent->is_string()});
  }
  return models;
}

WorkerCounters parse_worker_counters(std::string_view text, std::optional<unsigned> engine) {
  WorkerCounters counters;
  const std::string label = engine ? "engine=\"" + std::to_string(*engine) + "\"" : "";
  const auto counts = [&](std::string_view line, std::string_view name) {
    return is_sample_of(line, name) && (label.empty() || after_label(line, label) != std::string_view::npos);
  };
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (counts(line, "vllm:prefix_cache_queries_total")) {
      counters.cache_queries += static_cast<std::uint64_t>(value_of(line));
    } else if (counts(line, "vllm:prefix_cache_hits_total")) {
      counters.cache_hits += static_cast<std::uint64_t>(value_of(line));
    } else if (is_sample_of(line, "vllm:cache_config_info")) {
      constexpr std::string_view kKey = "block_size=\"";
      const std::size_t at = after_label(line, kKey);
      if (at == std::string_view::npos) continue;
      std::size_t size = 0;
      std::from_chars(line.data() + at, line.data() + line.size(), size);
      counters.block_size = size;
    }
  }
  return counters;
}

}  // namespace kvrouter
