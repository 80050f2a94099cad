// A line of JSON for each request that is done: what it cost and who served it, never what it said.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>

#include "kvrouter/prefix_index.h"

namespace kvrouter {

struct AccessRecord {
  std::string method;
  std::string path;  // without the query, which may hold secrets
  unsigned status = 0;
  std::optional<WorkerId> worker;
  std::string worker_url;
  std::string model;
  std::size_t prompt_tokens = 0;
  std::uint32_t overlap_blocks = 0;
  std::uint64_t bytes = 0;  // of the answer's body
  unsigned retries = 0;
  double seconds = 0;
  double first_byte_s = 0;
  double queued_s = 0;
  std::string traceparent;
};

class AccessLog {
 public:
  // "-": standard error; empty: no log.  Throws std::system_error when the file cannot be opened.
  explicit AccessLog(const std::string& path);
  ~AccessLog();
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;

  bool enabled() const { return file_ != nullptr; }
  void write(const AccessRecord& record);

 private:
  std::FILE* file_ = nullptr;
};

}  // namespace kvrouter
