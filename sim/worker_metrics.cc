#include "sim/worker_metrics.h"

#include <charconv>
#include <string_view>

namespace kvrouter::sim {
namespace {

std::string number(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof(text), value).ptr;
  return {text, end};
}

std::string label_escaped(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

std::string metrics_page(const WorkerStats& stats, const std::string& model, std::int32_t block_size,
                         std::int32_t num_blocks) {
  const std::string labels = "engine=\"0\",model_name=\"" + label_escaped(model) + "\"";
  std::string page;
  const auto metric = [&](std::string_view name, std::string_view type, std::string_view help, double value,
                          const std::string& metric_labels) {
    page.append("# HELP ").append(name).append(" ").append(help).append("\n# TYPE ").append(name).append(" ");
    page.append(type).append("\n").append(name);
    page.append("{").append(metric_labels).append("} ").append(number(value)).append("\n");
  };
  const SchedulerCounters& counters = stats.counters;
  const auto count = [](std::int64_t value) { return static_cast<double>(value); };
  metric("vllm:num_requests_running", "gauge", "Requests in the batch.", count(stats.running), labels);
  metric("vllm:num_requests_waiting", "gauge", "Requests queued.", count(stats.waiting), labels);
  metric("vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache in use, 0 to 1.", stats.kv_usage, labels);
  metric("vllm:prefix_cache_queries_total", "counter", "Tokens looked up in the prefix cache.",
         count(counters.prefix_cache_queries), labels);
  metric("vllm:prefix_cache_hits_total", "counter", "Tokens found in the prefix cache.",
         count(counters.prefix_cache_hits), labels);
  metric("vllm:prompt_tokens_total", "counter", "Prompt tokens processed.", count(counters.prompt_tokens), labels);
  metric("vllm:generation_tokens_total", "counter", "Tokens generated.", count(counters.generation_tokens), labels);
  metric("vllm:num_preemptions_total", "counter", "Requests preempted.", count(counters.preemptions), labels);
  metric("vllm:request_success_total", "counter", "Requests finished.", count(counters.finished),
         labels + ",finished_reason=\"length\"");
  metric("vllm:cache_config_info", "gauge", "The KV cache's configuration.", 1,
         "block_size=\"" + std::to_string(block_size) + "\",engine=\"0\",num_gpu_blocks=\"" +
             std::to_string(num_blocks) + "\"");
  return page;
}

std::string load_message(const WorkerStats& stats) {
  return "{\"kv_cache_usage\": " + number(stats.kv_usage) + ", \"num_waiting_reqs\": " + std::to_string(stats.waiting) +
         ", \"num_running_reqs\": " + std::to_string(stats.running) + "}";
}

std::string held_blocks_json(const BlockPool::Held& held, std::uint64_t batches) {
  const auto list = [](const std::vector<BlockHash>& hashes) {
    std::string out = "[";
    for (const BlockHash hash : hashes) {
      if (out.size() > 1) out += ',';
      out += std::to_string(hash);
    }
    return out + "]";
  };
  return "{\"batches\":" + std::to_string(batches) + ",\"blocks\":" + list(held.told) +
         ",\"told_removed\":" + list(held.told_removed) + "}";
}

}  // namespace kvrouter::sim
