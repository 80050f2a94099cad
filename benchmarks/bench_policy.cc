// What a decision costs, by policy, with all state in place: an index of cached prompts, 64 requests in flight at each
// worker, their prefixes on the way, load messages that come in between, and feedback for all that is sent.
//
//   bench_policy [--workers N] [--decisions N] [--policy NAME]
//
// A request has 32 blocks of 64 tokens: the prompt of one of 512 groups, half of which some workers cache; its blocks
// are hashed already.  `batch` decides 1,024 requests in one call: 64 groups of 16 samples each, sent again after they
// completed.  Prints one line of JSON with an entry a policy; times of a decision in nanoseconds, of a batch in
// microseconds.  Feedback and load messages are not part of them.
#include <charconv>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <string_view>

#include "kvrouter/router.h"
#include "measure.h"

namespace kvrouter::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kBlockSize = 64, kBlocks = 32, kTokens = kBlocks * kBlockSize;
constexpr std::size_t kPrompts = 512, kHolders = 2, kInFlight = 64;  // in flight: of each worker
constexpr std::size_t kGroups = 64, kSamples = 16, kBatches = 50;

struct Options {
  std::size_t workers = 32;
  std::size_t decisions = 50'000;
  std::string policy;  // empty: all
};

Options parse(int argc, char** argv) {
  Options options;
  const std::vector<std::string_view> args(argv + 1, argv + argc);
  for (std::size_t i = 0; i < args.size(); i += 2) {
    if (i + 1 == args.size()) throw std::invalid_argument(std::string(args[i]) + " needs a value");
    const std::string_view value = args[i + 1];
    if (args[i] == "--policy") {
      options.policy = value;
      continue;
    }
    std::size_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if ((args[i] != "--workers" && args[i] != "--decisions") || error != std::errc() ||
        end != value.data() + value.size() || number == 0) {
      throw std::invalid_argument("usage: bench_policy [--workers N] [--decisions N] [--policy NAME], N above 0");
    }
    (args[i] == "--workers" ? options.workers : options.decisions) = number;
  }
  return options;
}

class Fleet {
 public:
  Fleet(const std::string& policy, std::size_t workers) : random_(1), router_(options(policy, workers)) {
    for (std::size_t p = 0; p < kPrompts; ++p) {
      std::vector<StoredBlock> stored;
      for (std::size_t b = 0; b < kBlocks; ++b) {
        prompts_[p].push_back(random_());
        stored.push_back({prompts_[p].back(), random_()});
      }
      if (p % 2 != 0) continue;
      for (std::size_t h = 0; h < kHolders; ++h) {
        router_.index().store(static_cast<WorkerId>(random_() % workers), std::nullopt, stored);
      }
    }
    for (std::size_t i = 0; i < workers * kInFlight; ++i) decide();
  }

  // Nanoseconds of one decision.  The oldest request completes before it, and a worker says how loaded it is.
  std::uint64_t next() {
    const Ticket oldest = tickets_[first_++];
    router_.first_token(oldest);
    router_.complete(oldest, {300, 0.05});
    if (first_ == tickets_.size() / 2) {
      tickets_.erase(tickets_.begin(), tickets_.begin() + static_cast<std::ptrdiff_t>(first_));
      first_ = 0;
    }
    const auto worker = static_cast<WorkerId>(random_() % router_.num_workers());
    router_.loads().update(worker, {0.5, static_cast<std::int64_t>(random_() % 8), kInFlight});
    return decide();
  }

  // Nanoseconds of a batch of requests that nobody caches, which complete afterwards.
  std::uint64_t batch() {
    for (std::size_t g = 0; g < kGroups; ++g) {
      for (LocalHash& hash : groups_[g]) hash = random_();
      if (groups_[g].empty()) {
        for (std::size_t b = 0; b < kBlocks; ++b) groups_[g].push_back(random_());
      }
    }
    std::vector<BatchRequest> requests;
    for (std::size_t i = 0; i < kGroups * kSamples; ++i) requests.push_back({groups_[i / kSamples], kTokens});
    std::vector<Choice> choices(requests.size());
    const std::uint64_t start = now_ns();
    router_.choose_batch(requests, choices);
    const std::uint64_t ns = now_ns() - start;
    for (const Choice& choice : choices) router_.complete(choice.ticket, {300, 0.05});
    return ns;
  }

  std::uint64_t fallbacks() const { return router_.status().fallbacks; }

 private:
  static RouterOptions options(const std::string& policy, std::size_t workers) {
    RouterOptions options;
    options.block_size = kBlockSize;
    options.workers.resize(workers);
    options.policy = policy;
    options.seed = 1;
    return options;
  }

  std::uint64_t decide() {
    const std::vector<LocalHash>& prompt = prompts_[random_() % kPrompts];
    const std::uint64_t start = now_ns();
    const Choice choice = router_.choose(prompt, kTokens);
    const std::uint64_t ns = now_ns() - start;
    tickets_.push_back(choice.ticket);
    return ns;
  }

  std::mt19937_64 random_;
  Router router_;
  std::vector<LocalHash> prompts_[kPrompts];
  std::vector<LocalHash> groups_[kGroups];
  std::vector<Ticket> tickets_;
  std::size_t first_ = 0;  // of the tickets: those before it are completed
};

Json measure(const std::string& policy, const Options& options) {
  Fleet fleet(policy, options.workers);
  for (std::size_t i = 0; i < options.decisions / 10; ++i) fleet.next();
  std::vector<std::uint64_t> decisions, batches;
  for (std::size_t i = 0; i < options.decisions; ++i) decisions.push_back(fleet.next());
  for (std::size_t i = 0; i < kBatches; ++i) batches.push_back(fleet.batch());
  if (fleet.fallbacks() != 0) throw std::runtime_error(policy + ": decisions failed");
  return {{"policy", policy},
          {"p50_ns", percentile(decisions, 0.5)},
          {"p99_ns", percentile(decisions, 0.99)},
          {"batch_p50_us", percentile(batches, 0.5) / 1000},
          {"batch_max_us", percentile(batches, 1) / 1000}};
}

}  // namespace
}  // namespace kvrouter::bench

int main(int argc, char** argv) try {
  using namespace kvrouter::bench;
  const Options options = parse(argc, argv);
  pin_to_core(0);
  Json rows = Json::array();
  for (const std::string& policy : kvrouter::policy_names()) {
    if (options.policy.empty() || options.policy == policy) rows.push_back(measure(policy, options));
  }
  if (rows.empty()) throw std::invalid_argument("policy '" + options.policy + "' is unknown");
  std::cout << Json{{"workers", options.workers}, {"block_size", kBlockSize}, {"blocks", kBlocks}, {"policies", rows}}
            << '\n';
} catch (const std::exception& error) {
  std::cerr << "bench_policy: " << error.what() << '\n';
  return 1;
}
