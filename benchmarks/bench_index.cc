// The prefix index on an op stream: throughput of events and finds, latency of finds, memory, checksums.
//
//   bench_index FILE.ops [--threads N] [--seconds S] [--repeat R] [--memory-limit BYTES]
//   bench_index --churn PAIRS ROUNDS
//
// Prints one line of JSON.  The keys up to `interleaved_checksum` are those that peers/dynamo prints.
// --threads N: besides, a writer at full speed beside N - 1 readers, about S seconds with it and S without.
// --repeat R: medians of R replays in this process; memory is that of the first.
// --memory-limit BYTES: the replays' index gives up what is beyond it; besides, what that costs.
// Fails when replays disagree, when the index answers otherwise after concurrent writing, or keeps what was removed.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

#include "replay.h"

namespace kvrouter::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kUsage[] =
    "usage: bench_index FILE.ops [--threads N] [--seconds S] [--repeat R] [--memory-limit BYTES]\n"
    "       bench_index --churn PAIRS ROUNDS\n";

struct Options {
  std::string file;
  std::size_t threads = 1;
  std::size_t repeat = 1;
  double seconds = 2;
  std::size_t memory_limit = 0;
  std::size_t churn_pairs = 0;
  std::size_t churn_rounds = 0;
};

std::size_t parse_count(std::string_view text, std::string_view option) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value == 0) {
    throw std::invalid_argument(std::string(option) + " must be a whole number above 0, got '" + std::string(text) +
                                "'");
  }
  return value;
}

double parse_seconds(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value > 0 && value <= 3600)) {
    throw std::invalid_argument("--seconds must be above 0 and at most 3600, got '" + std::string(text) + "'");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  const std::vector<std::string_view> args(argv + 1, argv + argc);
  for (std::size_t i = 0; i < args.size(); ++i) {
    const std::string_view option = args[i];
    const auto value = [&] {
      if (i + 1 == args.size()) throw std::invalid_argument(std::string(option) + " needs a value");
      return args[++i];
    };
    if (option == "--threads") {
      options.threads = parse_count(value(), option);
    } else if (option == "--repeat") {
      options.repeat = parse_count(value(), option);
    } else if (option == "--memory-limit") {
      options.memory_limit = parse_count(value(), option);
    } else if (option == "--seconds") {
      options.seconds = parse_seconds(value());
    } else if (option == "--churn") {
      options.churn_pairs = parse_count(value(), "--churn PAIRS");
      options.churn_rounds = parse_count(value(), "--churn ROUNDS");
    } else if (option.starts_with("--") || !options.file.empty()) {
      throw std::invalid_argument("unknown argument " + std::string(option));
    } else {
      options.file = option;
    }
  }
  if (options.file.empty() == (options.churn_pairs == 0)) {
    throw std::invalid_argument("give an op stream, or --churn PAIRS ROUNDS");
  }
  return options;
}

template <typename T, typename Figures>
double median(const std::vector<Figures>& runs, T Figures::* figure) {
  std::vector<double> values;
  for (const Figures& run : runs) values.push_back(static_cast<double>(run.*figure));
  std::sort(values.begin(), values.end());
  return values[(values.size() - 1) / 2];
}

std::uint64_t rounded(double value) {
  return static_cast<std::uint64_t>(std::llround(value));
}

void add_replay(const std::vector<ReplayFigures>& runs, Json& out) {
  out["event_blocks_per_s"] = rounded(median(runs, &ReplayFigures::event_blocks_per_s));
  out["find_per_s"] = rounded(median(runs, &ReplayFigures::find_per_s));
  out["find_blocks_per_s"] = rounded(median(runs, &ReplayFigures::find_blocks_per_s));
  out["find_p50_ns"] = rounded(median(runs, &ReplayFigures::find_p50_ns));
  out["find_p99_ns"] = rounded(median(runs, &ReplayFigures::find_p99_ns));
  out["find_p999_ns"] = rounded(median(runs, &ReplayFigures::find_p999_ns));
  out["rss_bytes"] = runs.front().rss_bytes;
  out["checksum"] = checksum_text(runs.front().checksum);
  out["interleaved_checksum"] = checksum_text(runs.front().interleaved_checksum);
}

void add_concurrent(const ConcurrentFigures& figures, Json& out) {
  out["readers"] = figures.readers;
  out["cores"] = usable_cores();
  out["event_blocks_per_s_under_read"] = rounded(figures.event_blocks_per_s_under_read);
  const auto add = [&](const std::string& suffix, const DurationHistogram& durations, double per_s) {
    out["find_per_s" + suffix] = rounded(per_s);
    out["find_p50_ns" + suffix] = durations.percentile(0.5);
    out["find_p99_ns" + suffix] = durations.percentile(0.99);
    out["find_p999_ns" + suffix] = durations.percentile(0.999);
    out["find_max_ns" + suffix] = durations.max_ns();
  };
  add("_quiet", figures.quiet, figures.find_per_s_quiet);
  add("_under_write", figures.under_write, figures.find_per_s_under_write);
}

int run_stream(const Options& options) {
  const OpStream stream(options.file);
  if (stream.event_blocks() == 0 || stream.num_finds() == 0) {
    throw std::runtime_error(options.file + " has no events or no finds: nothing to measure");
  }
  pin_to_core(usable_cores() - 1);  // the last: the first has more of the system's own work
  std::vector<ReplayFigures> runs;
  for (std::size_t i = 0; i < options.repeat; ++i) {
    runs.push_back(replay(stream, options.memory_limit));
    if (runs.back().checksum != runs.front().checksum ||
        runs.back().interleaved_checksum != runs.front().interleaved_checksum) {
      throw std::runtime_error("two replays of the same op stream disagree");
    }
  }
  Json out;
  out["peer"] = "kvrouter";
  out["ops"] = options.file.substr(options.file.find_last_of('/') + 1);
  add_replay(runs, out);
  if (options.memory_limit > 0) {
    out["memory_limit"] = options.memory_limit;
    out["memory_bytes"] = runs.front().stats.memory_bytes;
    out["given_up_blocks"] = runs.front().stats.given_up_blocks;
    out["interleaved_best_blocks"] = runs.front().interleaved_best;
  }
  bool same_after = true;
  if (options.threads > 1) {
    const ConcurrentFigures figures = replay_concurrently(stream, options.threads - 1, options.seconds);
    add_concurrent(figures, out);
    same_after = figures.same_after;
  }
  std::cout << out.dump() << std::endl;
  if (!same_after) std::cerr << "bench_index: the index answers otherwise after concurrent writing\n";
  return same_after ? 0 : 1;
}

int run_churn(const Options& options) {
  const ChurnFigures figures = churn(options.churn_pairs, options.churn_rounds);
  Json out;
  out["peer"] = "kvrouter";
  out["churn_pairs"] = options.churn_pairs;
  out["churn_rounds"] = options.churn_rounds;
  out["event_blocks_per_s"] = rounded(figures.event_blocks_per_s);
  out["rss_bytes_empty"] = figures.rss_empty;
  out["rss_bytes_full_first"] = figures.rss_full_first;
  out["rss_bytes_first"] = figures.rss_first;
  out["rss_bytes_full_last"] = figures.rss_full_last;
  out["rss_bytes_last"] = figures.rss_last;
  out["pairs_left"] = figures.pairs_left;
  std::cout << out.dump() << std::endl;
  if (figures.pairs_left != 0) std::cerr << "bench_index: pairs are left that were removed\n";
  return figures.pairs_left == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvrouter::bench

int main(int argc, char** argv) {
  using namespace kvrouter::bench;
  try {
    const Options options = parse(argc, argv);
    return options.file.empty() ? run_churn(options) : run_stream(options);
  } catch (const std::invalid_argument& error) {
    std::cerr << "bench_index: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "bench_index: " << error.what() << "\n";
    return 1;
  }
}
