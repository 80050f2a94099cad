// The fleet simulator: kvrouter._core.simulate_fleet; kvrouter.simulate is its Python face.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "sim/fleet.h"

namespace nb = nanobind;

namespace kvrouter::python {
namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<sim::FleetRequest> read_requests(const Column<double>& arrival, const Column<std::int64_t>& follows,
                                             const Column<std::int32_t>& output_tokens,
                                             const Column<double>& expected_output,
                                             const Column<std::int64_t>& first_segment,
                                             const Column<std::uint64_t>& segment_seed,
                                             const Column<std::int32_t>& segment_length) {
  const std::size_t count = arrival.shape(0);
  const auto same = [](std::size_t a, std::size_t b) {
    if (a != b) throw std::invalid_argument("the columns of the requests must be of one length");
  };
  same(follows.shape(0), count);
  same(output_tokens.shape(0), count);
  same(expected_output.shape(0), count);
  same(first_segment.shape(0), count + 1);
  same(segment_seed.shape(0), segment_length.shape(0));
  std::vector<sim::FleetRequest> requests(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t first = first_segment(i), last = first_segment(i + 1);
    if (first < 0 || last < first || static_cast<std::size_t>(last) > segment_seed.shape(0)) {
      throw std::invalid_argument("first_segment must rise from 0 to the number of segments");
    }
    requests[i] = {arrival(i), follows(i), output_tokens(i), expected_output(i), {}};
    for (std::int64_t s = first; s < last; ++s) {
      requests[i].segments.push_back(
          {segment_seed(static_cast<std::size_t>(s)), segment_length(static_cast<std::size_t>(s))});
    }
  }
  return requests;
}

nb::typed<nb::dict, nb::str, double> to_dict(const sim::FleetResult& result) {
  nb::typed<nb::dict, nb::str, double> out;
  out["seconds"] = result.seconds;
  out["tokens_per_s"] = result.tokens_per_s;
  out["ttft_p50_s"] = result.ttft_p50_s;
  out["ttft_p99_s"] = result.ttft_p99_s;
  out["latency_p99_s"] = result.latency_p99_s;
  out["hit_rate"] = result.hit_rate;
  out["imbalance"] = result.imbalance;
  out["preemptions"] = result.preemptions;
  out["steps"] = result.steps;
  out["requests"] = result.requests;
  out["decision_p50_us"] = result.decision_p50_us;
  return out;
}

}  // namespace

void bind_fleet(nb::module_& m) {
  m.def(
      "simulate_fleet",
      [](const Column<double>& arrival, const Column<std::int64_t>& follows, const Column<std::int32_t>& output_tokens,
         const Column<double>& expected_output, const Column<std::int64_t>& first_segment,
         const Column<std::uint64_t>& segment_seed, const Column<std::int32_t>& segment_length,
         std::int32_t num_workers, const std::string& policy, std::uint64_t seed, std::int32_t users,
         std::int32_t num_blocks, std::int32_t block_size, std::int32_t max_num_seqs,
         std::int32_t max_num_batched_tokens, std::int32_t max_model_len, std::uint32_t vocab_size, double step_s,
         double weights_s, double prefill_token_s, double attention_pair_s, double decode_sequence_s,
         double decode_pair_s, double event_delay_s, double load_delay_s, double load_interval_s, double load_loss,
         double network_delay_s, bool feedback, bool batches, const std::vector<double>& slowdown) {
        sim::FleetOptions options;
        options.num_workers = num_workers;
        options.policy = policy;
        options.seed = seed;
        options.users = users;
        options.scheduler = {max_num_seqs, max_num_batched_tokens, max_model_len, vocab_size};
        options.blocks = {num_blocks, block_size, true, true, seed};
        options.time = {step_s, prefill_token_s, attention_pair_s, decode_sequence_s, 1.0, decode_pair_s, weights_s};
        options.event_delay = event_delay_s;
        options.load_delay = load_delay_s;
        options.load_interval = load_interval_s;
        options.load_loss = load_loss;
        options.network_delay = network_delay_s;
        options.feedback = feedback;
        options.batches = batches;
        options.slowdown = slowdown;
        const std::vector<sim::FleetRequest> requests = read_requests(arrival, follows, output_tokens, expected_output,
                                                                      first_segment, segment_seed, segment_length);
        sim::FleetResult result;
        {
          const nb::gil_scoped_release release;
          result = sim::run_fleet(options, requests);
        }
        return to_dict(result);
      },
      nb::kw_only(), nb::arg("arrival"), nb::arg("follows"), nb::arg("output_tokens"), nb::arg("expected_output"),
      nb::arg("first_segment"), nb::arg("segment_seed"), nb::arg("segment_length"), nb::arg("num_workers"),
      nb::arg("policy"), nb::arg("seed"), nb::arg("users"), nb::arg("num_blocks"), nb::arg("block_size"),
      nb::arg("max_num_seqs"), nb::arg("max_num_batched_tokens"), nb::arg("max_model_len"), nb::arg("vocab_size"),
      nb::arg("step_s"), nb::arg("weights_s"), nb::arg("prefill_token_s"), nb::arg("attention_pair_s"),
      nb::arg("decode_sequence_s"), nb::arg("decode_pair_s"), nb::arg("event_delay_s"), nb::arg("load_delay_s"),
      nb::arg("load_interval_s"), nb::arg("load_loss"), nb::arg("network_delay_s"), nb::arg("feedback"),
      nb::arg("batches"), nb::arg("slowdown"),
      "Runs a fleet of simulated workers in virtual time; see sim/fleet.h.  ValueError for input that cannot be run.");
}

}  // namespace kvrouter::python
