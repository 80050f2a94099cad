// What the service itself spends on a request, step by step, without any socket: medians in nanoseconds.
//
//   bench_gateway [--rounds N]
//
// One line of JSON: for prompts of so many token ids (about five bytes each in the body), reading the body, hashing its
// blocks of 64, the decision among two workers of which one holds it all; and `find_best_worker`, the whole handler
// with the hashes of 2,048 tokens.
#include <charconv>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "kvrouter/router.h"
#include "measure.h"
#include "server/gateway_request.h"
#include "server/router_api.h"

namespace kvrouter::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kBlockSize = 64;

std::uint64_t median_ns(std::size_t rounds, const std::function<void()>& step) {
  std::vector<std::uint64_t> taken(rounds);
  step();
  for (std::uint64_t& ns : taken) {
    const std::uint64_t begin = now_ns();
    step();
    ns = now_ns() - begin;
  }
  return percentile(taken, 0.5);
}

RouterOptions two_workers() {
  RouterOptions options;
  options.block_size = kBlockSize;
  options.workers.resize(2);
  return options;
}

void hold(Router& router, const std::vector<LocalHash>& hashes) {
  std::vector<StoredBlock> blocks;
  for (const LocalHash hash : hashes) blocks.push_back({hash, hash});
  router.index().store(1, std::nullopt, blocks);
}

Json measure_prompt(std::size_t num_tokens, std::size_t rounds) {
  std::vector<TokenId> tokens(num_tokens);
  for (std::size_t i = 0; i < num_tokens; ++i) tokens[i] = static_cast<TokenId>(i * 7919 % 100'000);
  const std::string body = Json{{"model", "m"}, {"prompt", tokens}, {"max_tokens", 16}, {"stream", true}}.dump(-1, ' ');
  std::vector<LocalHash> hashes(num_tokens / kBlockSize);
  hash_blocks(tokens, kBlockSize, 0, hashes);
  Router router(two_workers());
  hold(router, hashes);
  const std::vector<std::uint8_t> eligible(2, 1);
  return {{"tokens", num_tokens},
          {"body_bytes", body.size()},
          {"read_ns", median_ns(rounds,
                                [&] {
                                  GatewayRequest request;
                                  if (!parse_gateway_request(body, request).empty() || request.tokens != tokens) {
                                    throw std::runtime_error("the body was read wrongly");
                                  }
                                })},
          {"hash_ns", median_ns(rounds, [&] { hash_blocks(tokens, kBlockSize, 0, hashes); })},
          {"decide_ns", median_ns(rounds, [&] {
             const Decision decision = router.explain(RouteQuery{hashes, num_tokens, eligible});
             if (decision.choice.worker != 1) throw std::runtime_error("a wrong decision");
           })}};
}

std::uint64_t measure_handler(std::size_t rounds) {
  std::vector<LocalHash> hashes(32);
  for (std::size_t i = 0; i < hashes.size(); ++i) hashes[i] = (i + 1) * 0x9E3779B97F4A7C15u;
  Router router(two_workers());
  hold(router, hashes);
  const HttpRequest request{"POST", "/find_best_worker", "",
                            Json{{"local_hashes", hashes}, {"num_tokens", 2048}}.dump()};
  return median_ns(rounds, [&] {
    if (answer_router_request(router, request).body != R"({"worker_id":1,"overlap_blocks":32})") {
      throw std::runtime_error("a wrong answer");
    }
  });
}

int run(int argc, char** argv) {
  std::size_t rounds = 20'000;
  const std::string_view value = argc == 3 ? argv[2] : "";
  if (argc != 1 &&
      (argc != 3 || std::string_view(argv[1]) != "--rounds" ||
       std::from_chars(value.data(), value.data() + value.size(), rounds).ec != std::errc() || rounds == 0)) {
    std::cerr << "usage: bench_gateway [--rounds N], N above 0\n";
    return 2;
  }
  Json prompts = Json::array();
  for (const std::size_t tokens : {2048, 16384}) prompts.push_back(measure_prompt(tokens, rounds));
  std::cout << Json{{"prompts", prompts}, {"find_best_worker_ns", measure_handler(rounds)}}.dump() << "\n";
  return 0;
}

}  // namespace
}  // namespace kvrouter::bench

int main(int argc, char** argv) {
  return kvrouter::bench::run(argc, argv);
}
