// Continuous batching in virtual time.  Follows vLLM V1's scheduler (first come first served, chunked prefill, no
// speculative decoding): every step gives each running request the tokens it still has to compute, as far as the
// token budget goes, then admits waiting ones; when blocks run out the request admitted last is preempted and later
// computed anew.
//
// Nothing here sleeps or looks at a clock: the caller runs begin_step(), lets StepTimeModel's time pass, and runs
// finish_step().  The same code serves a worker in real time and a fleet in simulated time.  Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "sim/block_manager.h"
#include "sim/step_time.h"

namespace kvrouter::sim {

struct SchedulerOptions {
  std::int32_t max_num_seqs = 256;
  std::int32_t max_num_batched_tokens = 2048;  // tokens computed in one step
  std::int32_t max_model_len = 8192;           // tokens of prompt and output together
  Token vocab_size = 1024;
};

// Tokens below this are special in the tiny models that the simulated worker stands in for; none is ever generated.
inline constexpr Token kFirstPlainToken = 3;

// The token at `position` of what follows a prompt: the same on every worker.  REQUIRES: vocab_size > kFirstPlainToken.
std::uint64_t prompt_key(const std::vector<Token>& prompt, std::uint64_t seed);
Token generated_token(std::uint64_t prompt_key, std::int64_t position, Token vocab_size);

struct Request {
  Request(std::vector<Token> prompt, std::int32_t max_new_tokens, std::uint64_t seed)
      : num_prompt_tokens(static_cast<std::int32_t>(prompt.size())),
        max_tokens(max_new_tokens),
        key(prompt_key(prompt, seed)) {
    sequence.tokens = std::move(prompt);
  }
  virtual ~Request() = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  Sequence sequence;
  std::int32_t num_prompt_tokens;
  std::int32_t max_tokens;
  std::uint64_t key;
  std::int32_t num_computed_tokens = 0;
  std::int32_t num_scheduled_tokens = 0;  // in the step under way
  std::int32_t num_cached_tokens = -1;    // found in the prefix cache at first admission; -1 before it
  std::int32_t num_preemptions = 0;
  bool finished = false;

  std::int32_t num_tokens() const { return static_cast<std::int32_t>(sequence.tokens.size()); }
  std::int32_t num_output_tokens() const { return num_tokens() - num_prompt_tokens; }
};

// Counted since the start, as vLLM's /metrics does.
struct SchedulerCounters {
  std::int64_t prefix_cache_queries = 0;  // tokens
  std::int64_t prefix_cache_hits = 0;     // tokens
  std::int64_t prompt_tokens = 0;
  std::int64_t generation_tokens = 0;
  std::int64_t preemptions = 0;
  std::int64_t finished = 0;
};

class Scheduler {
 public:
  // Throws std::invalid_argument, naming the option, when a request of max_model_len tokens could never run.
  Scheduler(const SchedulerOptions& options, const BlockManagerOptions& blocks);

  // Why this request cannot be served, or null.
  const char* refusal(std::int64_t num_prompt_tokens, std::int64_t max_tokens) const;
  // REQUIRES: refusal() is null.
  void add(std::shared_ptr<Request> request);
  // Takes the request out, whatever its state.  REQUIRES: no step is under way.
  void cancel(Request& request);

  bool has_work() const { return !waiting_.empty() || !running_.empty(); }
  // Decides what the next step computes and takes the blocks for it.
  StepWork begin_step();
  // The step is computed: requests whose tokens are all computed get their next token; those that have enough are
  // finished and their blocks freed.  Returns the requests that got a token, valid until the next call.
  const std::vector<std::shared_ptr<Request>>& finish_step();
  // Forgets the prefix cache; false while requests hold blocks.  preempt_running: makes them give their blocks back
  // first, and compute anew.  REQUIRES: no step is under way.
  bool reset_prefix_cache(bool preempt_running);

  std::size_t num_waiting() const { return waiting_.size(); }
  std::size_t num_running() const { return running_.size(); }
  double kv_usage() const { return blocks_.pool().usage(); }
  const SchedulerCounters& counters() const { return counters_; }
  const SchedulerOptions& options() const { return options_; }
  BlockManager& blocks() { return blocks_; }
  const std::deque<std::shared_ptr<Request>>& waiting() const { return waiting_; }
  const std::vector<std::shared_ptr<Request>>& running() const { return running_; }

 private:
  void schedule(Request& request, std::int32_t count, StepWork& work);
  void preempt_last();

  SchedulerOptions options_;
  BlockManager blocks_;
  SchedulerCounters counters_;
  std::deque<std::shared_ptr<Request>> waiting_;
  std::vector<std::shared_ptr<Request>> running_;
  std::vector<std::shared_ptr<Request>> advanced_;
};

}  // namespace kvrouter::sim
