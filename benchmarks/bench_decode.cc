// From raw KV-event batches to the prefix index: what a block of 64 tokens costs, decoded only and decoded and applied.
//
//   bench_decode [--blocks N] [--repeat R] [--recording FILE]
//
// Prints one line of JSON with an entry a case: `map` and `array` (the two layouts of events, caches that only grow),
// `map_evicting` (full caches: every batch removes as many blocks as it stores) and `recording` (tests/golden, a
// session with vLLM 0.32.0).  Figures are medians of R passes; a pass that applies starts with an empty index.
// Fails when the decoder reads anything else than was written.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

#include "event_batches.h"
#include "index/index_sink.h"
#include "measure.h"

namespace kvrouter::bench {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::size_t blocks = 100'000;
  std::size_t repeat = 5;
  std::string recording = KVROUTER_GOLDEN_DIR "/vllm-0.32.0.bin";
};

class NullSink final : public KvEventSink {
 public:
  void on_stored(std::optional<EngineHash>, std::span<const StoredBlock> blocks) override { take(blocks.size()); }
  void on_removed(std::span<const EngineHash> blocks) override { take(blocks.size()); }
  void on_cleared() override { take(1); }

 private:
  void take(std::size_t size) { asm volatile("" : : "r"(size) : "memory"); }
};

std::uint64_t skipped(const KvEventCounts& counts) {
  return counts.skipped_unknown_type + counts.skipped_unknown_field + counts.skipped_block_size + counts.skipped_group +
         counts.skipped_medium + counts.skipped_invalid + counts.malformed_batches;
}

struct Pass {
  double seconds = 0;
  std::uint64_t stored = 0;
};

// One pass over all batches, `rounds` times; `sinks` has one a worker.
Pass run_pass(const BatchList& list, std::size_t rounds, const std::vector<std::unique_ptr<KvEventSink>>& sinks) {
  std::vector<KvEventDecoder> decoders;
  for (std::size_t i = 0; i < list.num_workers; ++i) decoders.emplace_back(kBlockSize);
  const std::uint64_t start = now_ns();
  for (std::size_t round = 0; round < rounds; ++round) {
    for (const RawBatch& batch : list.batches) {
      decoders[batch.worker].decode(std::as_bytes(std::span(batch.payload)), *sinks[batch.worker]);
    }
  }
  Pass pass;
  pass.seconds = static_cast<double>(now_ns() - start) / 1e9;
  std::uint64_t removed = 0;
  for (const KvEventDecoder& decoder : decoders) {
    if (skipped(decoder.counts()) != 0) throw std::runtime_error("the decoder skipped events or fields");
    pass.stored += decoder.counts().stored_blocks;
    removed += decoder.counts().removed_blocks;
  }
  if (list.stored_blocks > 0 &&
      (pass.stored != list.stored_blocks * rounds || removed != list.removed_blocks * rounds)) {
    throw std::runtime_error("the decoder saw other blocks than were written");
  }
  return pass;
}

Pass decode_only(const BatchList& list, std::size_t rounds) {
  std::vector<std::unique_ptr<KvEventSink>> sinks;
  for (std::size_t i = 0; i < list.num_workers; ++i) sinks.push_back(std::make_unique<NullSink>());
  return run_pass(list, rounds, sinks);
}

Pass decode_and_apply(const BatchList& list, std::size_t rounds) {
  PrefixIndex index(list.num_workers);
  std::vector<std::unique_ptr<KvEventSink>> sinks;
  for (WorkerId i = 0; i < list.num_workers; ++i) sinks.push_back(std::make_unique<IndexSink>(index, i));
  const Pass pass = run_pass(list, rounds, sinks);
  if (list.stored_blocks > 0 && index.stats().pairs != list.stored_blocks - list.removed_blocks) {
    throw std::runtime_error("the index holds other blocks than the batches leave");
  }
  return pass;
}

std::uint64_t rounded(double value) {
  return static_cast<std::uint64_t>(std::llround(value));
}

Json figures_of(std::vector<Pass> passes, double bytes) {
  std::sort(passes.begin(), passes.end(), [](const Pass& a, const Pass& b) { return a.seconds < b.seconds; });
  const Pass& median = passes[(passes.size() - 1) / 2];
  const auto blocks = static_cast<double>(median.stored);
  Json out;
  out["blocks_per_s"] = rounded(blocks / median.seconds);
  out["ns_per_block"] = std::round(median.seconds * 1e10 / blocks) / 10;
  out["bytes_per_s"] = rounded(bytes / median.seconds);
  return out;
}

// Small lists go round several times, for a pass to last long enough to be measured.
Json measure(const std::string& name, const BatchList& list, std::size_t repeat, std::size_t rounds) {
  const auto bytes = static_cast<double>(list.bytes() * rounds);
  std::vector<Pass> decoding, applying;
  for (std::size_t i = 0; i < repeat + 1; ++i) {
    const Pass decoded = decode_only(list, rounds), applied = decode_and_apply(list, rounds);
    if (i == 0) continue;  // warms up
    decoding.push_back(decoded);
    applying.push_back(applied);
  }
  Json out;
  out["case"] = name;
  out["batches"] = list.batches.size();
  out["stored_blocks"] = decoding.front().stored / rounds;
  out["bytes_per_block"] = std::round(bytes / static_cast<double>(decoding.front().stored));
  out["decode"] = figures_of(decoding, bytes);
  out["decode_apply"] = figures_of(applying, bytes);
  return out;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view option = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(std::string(option) + " needs a value");
    const std::string_view text = argv[i + 1];
    if (option == "--recording") {
      options.recording = text;
      continue;
    }
    std::size_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value == 0) {
      throw std::invalid_argument(std::string(option) + " must be a whole number above 0");
    }
    if (option == "--blocks") {
      options.blocks = value;
    } else if (option == "--repeat") {
      options.repeat = value;
    } else {
      throw std::invalid_argument("unknown argument " + std::string(option));
    }
  }
  return options;
}

void run(const Options& options) {
  constexpr std::size_t kRecordingRounds = 500, kWorkers = 8;
  const std::size_t capacity = std::max<std::size_t>(64, options.blocks / kWorkers / 4);
  Json cases = Json::array();
  const auto add = [&](const std::string& name, Layout layout, std::size_t limit) {
    const BatchList list = make_batches({layout, kWorkers, options.blocks, limit});
    cases.push_back(measure(name, list, options.repeat, 1));
  };
  add("map", Layout::kMap, 0);
  add("array", Layout::kArray, 0);
  add("map_evicting", Layout::kMap, capacity);
  cases.push_back(measure("recording", read_recording(options.recording), options.repeat, kRecordingRounds));
  Json out;
  out["peer"] = "kvrouter";
  out["block_size"] = kBlockSize;
  out["cases"] = std::move(cases);
  std::cout << out.dump() << std::endl;
}

}  // namespace
}  // namespace kvrouter::bench

int main(int argc, char** argv) {
  using namespace kvrouter::bench;
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::invalid_argument& error) {
    std::cerr << "bench_decode: " << error.what()
              << "\nusage: bench_decode [--blocks N] [--repeat R] [--recording FILE]\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "bench_decode: " << error.what() << "\n";
    return 1;
  }
}
