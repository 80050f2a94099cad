// Load messages, and what a table makes of them.
#include "fuzz.h"
#include "kvrouter/worker_load.h"

namespace kvrouter::fuzz {

void fuzz_one(std::string_view input) {
  const LoadOrError parsed = parse_load_message(input);
  if (!parsed.ok()) return;
  FUZZ_CHECK(parsed.load.kv_usage >= 0 && parsed.load.kv_usage <= 1);
  FUZZ_CHECK(parsed.load.waiting >= 0 && parsed.load.running >= 0);
  LoadTable table(1);
  table.update(0, parsed.load);
  table.add_waiting(0);
  FUZZ_CHECK(table.get(0).waiting == parsed.load.waiting + 1);
  FUZZ_CHECK(table.said(0) == parsed.load);
}

}  // namespace kvrouter::fuzz
