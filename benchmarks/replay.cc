#include "replay.h"

#include <algorithm>

namespace kvrouter::bench {
namespace {

// Asks every find of the stream, twice; the second round is timed and summed.
void time_finds(const PrefixIndex& index, const OpStream& stream, ReplayFigures& out) {
  std::vector<std::uint32_t> overlap(stream.num_workers());
  std::vector<std::uint64_t> durations;
  std::uint64_t total_ns = 0;
  for (int round = 0; round < 2; ++round) {
    for (const Op& op : stream.ops()) {
      if (op.is_event()) continue;
      const std::uint64_t start = now_ns();
      index.find_matches(op.hashes, overlap);
      const std::uint64_t ns = now_ns() - start;
      if (round == 0) continue;
      durations.push_back(ns);
      total_ns += ns;
      out.checksum = add_to_checksum(out.checksum, overlap);
    }
  }
  const double seconds = static_cast<double>(total_ns) / 1e9;
  if (total_ns > 0) {
    out.find_per_s = static_cast<double>(durations.size()) / seconds;
    out.find_blocks_per_s = static_cast<double>(stream.find_blocks()) / seconds;
  }
  out.find_p50_ns = percentile(durations, 0.5);
  out.find_p99_ns = percentile(durations, 0.99);
  out.find_p999_ns = percentile(durations, 0.999);
}

// Fresh prefixes for churn(): an odd multiplier walks through all 64-bit numbers without meeting one twice.
class FreshHashes {
 public:
  std::uint64_t next() { return ++count_ * 0x9e3779b97f4a7c15; }

 private:
  std::uint64_t count_ = 0;
};

}  // namespace

ReplayFigures replay(const OpStream& stream, std::size_t memory_limit) {
  ReplayFigures out;
  std::vector<std::uint32_t> overlap(stream.num_workers());
  warm_memory();
  const std::uint64_t before = resident_bytes();
  PrefixIndex index(stream.num_workers(), memory_limit);
  std::uint64_t event_ns = 0;
  for (const Op& op : stream.ops()) {
    if (op.is_event()) {
      const std::uint64_t start = now_ns();
      apply(index, op);
      event_ns += now_ns() - start;
    } else {
      index.find_matches(op.hashes, overlap);
      out.interleaved_checksum = add_to_checksum(out.interleaved_checksum, overlap);
      out.interleaved_best += *std::max_element(overlap.begin(), overlap.end());
    }
  }
  out.rss_bytes = growth(before, resident_bytes());
  out.stats = index.stats();
  if (event_ns > 0) {
    out.event_blocks_per_s = static_cast<double>(stream.event_blocks()) / (static_cast<double>(event_ns) / 1e9);
  }
  time_finds(index, stream, out);
  return out;
}

ChurnFigures churn(std::size_t pairs, std::size_t rounds) {
  constexpr std::size_t kWorkers = 8, kChain = 32;
  std::vector<StoredBlock> blocks(pairs);
  std::vector<EngineHash> engines(pairs);
  const auto chain_at = [&](auto& of, std::size_t at) {
    return std::span(of).subspan(at, std::min(kChain, pairs - at));
  };
  const std::size_t chains = (pairs + kChain - 1) / kChain;
  FreshHashes fresh;
  const auto prepare = [&](bool last_first) {
    for (std::size_t i = 0; i < pairs; ++i) blocks[i] = {fresh.next(), fresh.next()};
    for (std::size_t i = 0; i < pairs; ++i) engines[i] = blocks[last_first ? pairs - 1 - i : i].engine;
  };
  prepare(true);  // once before memory is read: its pages are not the index's

  ChurnFigures out;
  const std::uint64_t before = resident_bytes();
  PrefixIndex index(kWorkers);
  out.rss_empty = growth(before, resident_bytes());
  std::uint64_t event_ns = 0;
  for (std::size_t round = 0; round < rounds; ++round) {
    const bool last_first = round % 3 == 0, clear = round % 3 == 2;
    prepare(last_first);
    const std::uint64_t start = now_ns();
    for (std::size_t chain = 0; chain < chains; ++chain) {
      index.store(static_cast<WorkerId>(chain % kWorkers), std::nullopt, chain_at(blocks, chain * kChain));
    }
    const std::uint64_t full = now_ns();
    const std::uint64_t rss_full = growth(before, resident_bytes());
    const std::uint64_t again = now_ns();
    if (clear) {
      for (WorkerId worker = 0; worker < kWorkers; ++worker) index.clear(worker);
    } else {
      std::size_t at = 0;  // in `engines`, which are in the order of removal
      for (std::size_t i = 0; i < chains; ++i) {
        const std::size_t chain = last_first ? chains - 1 - i : i;
        const std::size_t size = chain + 1 == chains ? pairs - chain * kChain : kChain;
        index.remove(static_cast<WorkerId>(chain % kWorkers), std::span(engines).subspan(at, size));
        at += size;
      }
    }
    event_ns += (full - start) + (now_ns() - again);
    if (round == 0) {
      out.rss_full_first = rss_full;
      out.rss_first = growth(before, resident_bytes());
    }
    out.rss_full_last = rss_full;
  }
  out.rss_last = growth(before, resident_bytes());
  out.pairs_left = index.stats().pairs;
  out.event_blocks_per_s = 2.0 * static_cast<double>(pairs * rounds) / (static_cast<double>(event_ns) / 1e9);
  return out;
}

}  // namespace kvrouter::bench
