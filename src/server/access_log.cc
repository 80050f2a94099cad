#include "server/access_log.h"

#include <cerrno>
#include <chrono>
#include <nlohmann/json.hpp>
#include <system_error>

namespace kvrouter {

AccessLog::AccessLog(const std::string& path) {
  if (path.empty()) return;
  file_ = path == "-" ? stderr : std::fopen(path.c_str(), "ae");
  if (!file_) throw std::system_error(errno, std::generic_category(), "cannot write the access log " + path);
}

AccessLog::~AccessLog() {
  if (file_ && file_ != stderr) std::fclose(file_);
}

void AccessLog::write(const AccessRecord& record) {
  if (!file_) return;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  nlohmann::json line = {{"time", std::chrono::duration<double>(now).count()},
                         {"method", record.method},
                         {"path", record.path},
                         {"status", record.status},
                         {"model", record.model},
                         {"prompt_tokens", record.prompt_tokens},
                         {"overlap_blocks", record.overlap_blocks},
                         {"bytes", record.bytes},
                         {"retries", record.retries},
                         {"seconds", record.seconds},
                         {"first_byte_s", record.first_byte_s},
                         {"queued_s", record.queued_s}};
  if (record.worker) {
    line["worker_id"] = *record.worker;
    line["worker"] = record.worker_url;
  }
  if (!record.traceparent.empty()) line["traceparent"] = record.traceparent;
  const std::string text = line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  std::fwrite(text.data(), 1, text.size(), file_);
  std::fflush(file_);
}

}  // namespace kvrouter
