#include <algorithm>
#include <atomic>
#include <barrier>
#include <thread>
#include <unordered_map>

#include "replay.h"

namespace kvrouter::bench {
namespace {

constexpr std::size_t kRemovalBlocks = 64;  // blocks in one removal of the writer
constexpr int kTurns = 4;                   // of quiet and of writing

// What the writer does again and again, without changing where it all ends.
class WriterRound {
 public:
  explicit WriterRound(const OpStream& stream) {
    std::vector<std::vector<const Op*>> events(stream.num_workers());
    for (const Op& op : stream.ops()) {
      if (op.is_event()) events[op.worker].push_back(&op);
    }
    held_.reserve(stream.num_workers());
    for (const std::vector<const Op*>& of_worker : events) {
      if (of_worker.empty()) continue;
      held_.push_back(held_at_end(of_worker));
      const std::span<const EngineHash> held = held_.back();
      for (std::size_t at = 0; at < held.size(); at += kRemovalBlocks) {
        const std::size_t size = std::min(kRemovalBlocks, held.size() - at);
        ops_.push_back({Op::Kind::kRemove, of_worker.front()->worker, {}, {}, held.subspan(at, size)});
      }
      for (const Op* op : of_worker) ops_.push_back(*op);
    }
  }

  const std::vector<Op>& ops() const { return ops_; }

 private:
  // The blocks that a worker's events leave it with, the one stored last first.
  static std::vector<EngineHash> held_at_end(const std::vector<const Op*>& events) {
    std::unordered_map<EngineHash, std::size_t> stored_at;
    std::size_t clock = 0;
    for (const Op* op : events) {
      if (op->kind == Op::Kind::kClear) stored_at.clear();
      for (const EngineHash engine : op->hashes) stored_at.erase(engine);
      for (const StoredBlock& block : op->stored) stored_at.try_emplace(block.engine, ++clock);
    }
    std::vector<std::pair<std::size_t, EngineHash>> order;
    for (const auto& [engine, when] : stored_at) order.emplace_back(when, engine);
    std::sort(order.rbegin(), order.rend());
    std::vector<EngineHash> held;
    for (const auto& [when, engine] : order) held.push_back(engine);
    return held;
  }

  std::vector<std::vector<EngineHash>> held_;
  std::vector<Op> ops_;
};

std::uint64_t checksum_of(const PrefixIndex& index, const std::vector<const Op*>& finds) {
  std::vector<std::uint32_t> overlap(index.num_workers());
  std::uint64_t sum = 0;
  for (const Op* op : finds) {
    index.find_matches(op->hashes, overlap);
    sum = add_to_checksum(sum, overlap);
  }
  return sum;
}

enum class Phase { kQuiet, kUnderWrite, kEnd };

// What the threads share.  `phase` changes only between the barrier at a phase's end and the one at the next one's
// beginning; a phase lasts while `running`.
struct Shared {
  const PrefixIndex& index;
  const std::vector<const Op*>& finds;
  std::atomic<Phase> phase;
  std::atomic<bool> running;
  std::barrier<> barrier;
};

struct alignas(128) Reader {
  DurationHistogram quiet;
  DurationHistogram under_write;
  double quiet_s = 0;
  double under_write_s = 0;
};

void read_until_the_phase_ends(Shared& shared, std::size_t& at, std::span<std::uint32_t> overlap,
                               DurationHistogram& durations, double& seconds) {
  const std::uint64_t begin = now_ns();
  while (shared.running.load(std::memory_order_relaxed)) {
    const std::uint64_t start = now_ns();
    shared.index.find_matches(shared.finds[at]->hashes, overlap);
    durations.record(now_ns() - start);
    if (++at == shared.finds.size()) at = 0;
  }
  seconds += static_cast<double>(now_ns() - begin) / 1e9;
}

void run_reader(Shared& shared, std::size_t core, std::size_t start, Reader& out) {
  pin_to_core(core);
  std::vector<std::uint32_t> overlap(shared.index.num_workers());
  std::size_t at = start;
  for (const Op* op : shared.finds) shared.index.find_matches(op->hashes, overlap);
  while (true) {
    shared.barrier.arrive_and_wait();
    const Phase phase = shared.phase.load();
    if (phase == Phase::kEnd) return;
    if (phase == Phase::kQuiet) {
      read_until_the_phase_ends(shared, at, overlap, out.quiet, out.quiet_s);
    } else {
      read_until_the_phase_ends(shared, at, overlap, out.under_write, out.under_write_s);
    }
    shared.barrier.arrive_and_wait();
  }
}

struct Written {
  std::uint64_t blocks = 0;
  std::uint64_t ns = 0;
};

// The writer's side of a phase: rounds at full speed until the time is over, and the last one to its end, with the
// readers still reading.
void write_for(PrefixIndex& index, const std::vector<Op>& round, std::uint64_t duration_ns, Written& out) {
  const std::uint64_t begin = now_ns();
  do {
    for (const Op& op : round) {
      apply(index, op);
      out.blocks += op.num_blocks();
    }
  } while (now_ns() - begin < duration_ns);
  out.ns += now_ns() - begin;
}

}  // namespace

ConcurrentFigures replay_concurrently(const OpStream& stream, std::size_t readers, double seconds) {
  PrefixIndex index(stream.num_workers());
  std::vector<const Op*> finds;
  for (const Op& op : stream.ops()) {
    if (op.is_event()) {
      apply(index, op);
    } else {
      finds.push_back(&op);
    }
  }
  const WriterRound round(stream);
  const std::uint64_t checksum = checksum_of(index, finds);

  usable_cores();  // reads which they are before this thread is pinned to one
  Shared shared{index, finds, Phase::kQuiet, false, std::barrier<>(static_cast<std::ptrdiff_t>(readers) + 1)};
  std::vector<Reader> results(readers);
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < readers; ++i) {
    threads.emplace_back([&, i] { run_reader(shared, i + 1, i * finds.size() / readers, results[i]); });
  }
  pin_to_core(0);
  const auto turn_ns = static_cast<std::uint64_t>(seconds / kTurns * 1e9);
  Written written;
  for (int turn = 0; turn < kTurns; ++turn) {
    for (const Phase phase : {Phase::kQuiet, Phase::kUnderWrite}) {
      shared.phase = phase;
      shared.running = true;
      shared.barrier.arrive_and_wait();
      if (phase == Phase::kQuiet) {
        std::this_thread::sleep_for(std::chrono::nanoseconds(turn_ns));
      } else {
        write_for(index, round.ops(), turn_ns, written);
      }
      shared.running = false;
      shared.barrier.arrive_and_wait();
    }
  }
  shared.phase = Phase::kEnd;
  shared.barrier.arrive_and_wait();
  threads.clear();

  ConcurrentFigures out;
  out.readers = readers;
  out.event_blocks_per_s_under_read = static_cast<double>(written.blocks) / (static_cast<double>(written.ns) / 1e9);
  for (const Reader& reader : results) {
    out.quiet.add(reader.quiet);
    out.under_write.add(reader.under_write);
    out.find_per_s_quiet += static_cast<double>(reader.quiet.count()) / reader.quiet_s;
    out.find_per_s_under_write += static_cast<double>(reader.under_write.count()) / reader.under_write_s;
  }
  out.same_after = checksum_of(index, finds) == checksum;
  return out;
}

}  // namespace kvrouter::bench
