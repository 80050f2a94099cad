#include "sim/scheduler.h"

#include <xxhash.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kvrouter::sim {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

std::uint64_t prompt_key(const std::vector<Token>& prompt, std::uint64_t seed) {
  return XXH3_64bits_withSeed(prompt.data(), prompt.size() * sizeof(Token), seed);
}

Token generated_token(std::uint64_t prompt_key, std::int64_t position, Token vocab_size) {
  const std::uint64_t bits = XXH3_64bits_withSeed(&position, sizeof(position), prompt_key);
  return kFirstPlainToken + static_cast<Token>(bits % (vocab_size - kFirstPlainToken));
}

Scheduler::Scheduler(const SchedulerOptions& options, const BlockManagerOptions& blocks)
    : options_(options), blocks_(blocks) {
  require(options.max_num_seqs >= 1, "max_num_seqs must be at least 1");
  require(options.max_num_batched_tokens >= 1, "max_num_batched_tokens must be at least 1");
  require(options.max_model_len >= 2, "max_model_len must be at least 2");
  require(options.vocab_size > kFirstPlainToken,
          "vocab_size must be more than " + std::to_string(kFirstPlainToken) + " (the first ids are special)");
  const std::int64_t room = (std::int64_t{blocks.num_blocks} - 1) * blocks.block_size;
  require(room >= options.max_model_len,
          "a request of max_model_len " + std::to_string(options.max_model_len) + " tokens does not fit the cache of " +
              std::to_string(room) + " tokens: raise num_blocks (block 0 is never used) or lower max_model_len");
}

const char* Scheduler::refusal(std::int64_t num_prompt_tokens, std::int64_t max_tokens) const {
  if (num_prompt_tokens < 1) return "the prompt is empty";
  if (max_tokens < 1) return "max_tokens must be at least 1";
  if (num_prompt_tokens + max_tokens > options_.max_model_len) return "prompt and max_tokens exceed max_model_len";
  return nullptr;
}

void Scheduler::add(std::shared_ptr<Request> request) {
  blocks_.hash_full_blocks(request->sequence);
  request->sequence.tokens.reserve(static_cast<std::size_t>(request->num_prompt_tokens + request->max_tokens));
  waiting_.push_back(std::move(request));
}

void Scheduler::cancel(Request& request) {
  const auto is_it = [&](const std::shared_ptr<Request>& other) { return other.get() == &request; };
  blocks_.free(request.sequence);
  request.finished = true;
  // The request may be owned by these queues alone: nothing touches it after this.
  if (std::erase_if(running_, is_it) == 0) std::erase_if(waiting_, is_it);
}

void Scheduler::schedule(Request& request, std::int32_t count, StepWork& work) {
  const bool decode = count == 1 && request.num_computed_tokens >= request.num_prompt_tokens &&
                      request.num_computed_tokens + 1 == request.num_tokens();
  work.add(request.num_computed_tokens, count, decode);
  request.num_scheduled_tokens = count;
}

void Scheduler::preempt_last() {
  std::shared_ptr<Request> victim = std::move(running_.back());
  running_.pop_back();
  blocks_.free(victim->sequence);
  victim->num_computed_tokens = 0;
  victim->num_scheduled_tokens = 0;
  ++victim->num_preemptions;
  ++counters_.preemptions;
  waiting_.push_front(std::move(victim));
}

bool Scheduler::reset_prefix_cache(bool preempt_running) {
  while (preempt_running && !running_.empty()) preempt_last();
  return blocks_.reset();
}

StepWork Scheduler::begin_step() {
  StepWork work;
  std::int32_t budget = options_.max_num_batched_tokens;
  bool preempted = false;

  for (std::size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Request& request = *running_[i];
    const std::int32_t count = std::min(request.num_tokens() - request.num_computed_tokens, budget);
    bool fits = false;
    while (!(fits = blocks_.allocate(request.sequence, request.num_computed_tokens + count, 0, false))) {
      // The last one admitted goes, be it the request itself; those before it in this step keep their blocks.
      preempt_last();
      preempted = true;
      if (i >= running_.size()) break;
    }
    if (!fits) break;
    schedule(request, count, work);
    budget -= count;
  }
  if (preempted) return work;

  while (budget > 0 && !waiting_.empty() && running_.size() < static_cast<std::size_t>(options_.max_num_seqs)) {
    Request& request = *waiting_.front();
    const std::int32_t hit_blocks = blocks_.find_cached_blocks(request.sequence);
    const std::int32_t hit_tokens = hit_blocks * blocks_.options().block_size;
    // Noted at each try, so that what counts is the lookup that led to the admission.
    if (request.num_preemptions == 0) request.num_cached_tokens = hit_tokens;
    const std::int32_t count = std::min(request.num_tokens() - hit_tokens, budget);
    if (!blocks_.allocate(request.sequence, hit_tokens + count, hit_blocks, true)) break;
    if (request.num_preemptions == 0) {
      counters_.prefix_cache_queries += request.num_tokens();
      counters_.prefix_cache_hits += hit_tokens;
    }
    request.num_computed_tokens = hit_tokens;
    schedule(request, count, work);
    budget -= count;
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
  return work;
}

const std::vector<std::shared_ptr<Request>>& Scheduler::finish_step() {
  advanced_.clear();
  bool any_finished = false;
  for (const auto& owner : running_) {
    Request& request = *owner;
    if (request.num_scheduled_tokens == 0) continue;
    request.num_computed_tokens += request.num_scheduled_tokens;
    request.num_scheduled_tokens = 0;
    if (request.num_computed_tokens < request.num_tokens()) continue;
    if (request.num_output_tokens() == 0) counters_.prompt_tokens += request.num_prompt_tokens;
    request.sequence.tokens.push_back(generated_token(request.key, request.num_output_tokens(), options_.vocab_size));
    ++counters_.generation_tokens;
    blocks_.hash_full_blocks(request.sequence);
    advanced_.push_back(owner);
    if (request.num_output_tokens() < request.max_tokens) continue;
    request.finished = any_finished = true;
    ++counters_.finished;
    blocks_.free(request.sequence);
  }
  if (any_finished) std::erase_if(running_, [](const auto& request) { return request->finished; });
  return advanced_;
}

}  // namespace kvrouter::sim
