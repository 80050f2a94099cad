// How long the engine takes for one step: terms that are linear in what the step computes, with the reading of the
// weights hidden behind the computation or the other way round.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvrouter::sim {

// What one step computes.
struct StepWork {
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_sequences = 0;
  std::int64_t attention_pairs = 0;  // (query token, context token) pairs of prefill
  std::int64_t decode_pairs = 0;     // and of decode: each reads a token's KV from memory

  // `count` tokens of a sequence of which `context` are computed already; prefill unless it is the one next token.
  void add(std::int64_t context, std::int64_t count, bool decode) {
    if (decode) {
      ++decode_sequences;
      decode_pairs += context + 1;
    } else {
      prefill_tokens += count;
      attention_pairs += count * context + count * (count + 1) / 2;
    }
  }
};

// All in seconds.  The defaults are of the order of an 8-layer, 512-wide model on one CPU core: a cold prompt of
// 1,600 tokens takes about a third of a second.
struct StepTimeModel {
  double step = 4e-3;
  double prefill_token = 180e-6;
  double attention_pair = 25e-9;
  double decode_sequence = 300e-6;
  double scale = 1.0;
  double decode_pair = 25e-9;
  double weights = 0;  // a step's computation of tokens takes no less: the weights are read once

  double seconds(const StepWork& work) const {
    const double tokens = prefill_token * static_cast<double>(work.prefill_tokens) +
                          decode_sequence * static_cast<double>(work.decode_sequences);
    return scale * (step + std::max(weights, tokens) + attention_pair * static_cast<double>(work.attention_pairs) +
                    decode_pair * static_cast<double>(work.decode_pairs));
  }
};

}  // namespace kvrouter::sim
