// kvrouter._core.SimWorker, the simulated worker, and SimEngine, its engine alone in virtual time.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sim/completions.h"
#include "sim/scheduler.h"
#include "sim/step_time.h"
#include "sim/worker.h"

namespace nb = nanobind;

namespace kvrouter::python {
namespace {

// The scheduler with its requests under numbers.
class Engine {
 public:
  Engine(const sim::SchedulerOptions& scheduler, const sim::BlockManagerOptions& blocks)
      : scheduler_(scheduler, blocks) {}

  std::int64_t add(std::vector<sim::Token> prompt, std::int32_t max_tokens, std::uint64_t seed) {
    if (const char* refusal = scheduler_.refusal(static_cast<std::int64_t>(prompt.size()), max_tokens)) {
      throw std::invalid_argument(refusal);
    }
    auto request = std::make_shared<Numbered>(std::move(prompt), max_tokens, seed);
    request->number = next_number_++;
    requests_.emplace(request->number, request);
    scheduler_.add(request);
    return request->number;
  }

  void cancel(std::int64_t number) {
    const auto found = requests_.find(number);
    if (found == requests_.end()) throw std::invalid_argument("no such request is waiting or running");
    scheduler_.cancel(*found->second);
    requests_.erase(found);
  }

  nb::typed<nb::dict, nb::str, nb::any> step() {
    const sim::StepWork work = scheduler_.begin_step();
    nb::dict scheduled, tokens, cached;
    for (const auto& request : scheduler_.running()) {
      const auto number = static_cast<Numbered&>(*request).number;
      if (request->num_scheduled_tokens > 0) scheduled[nb::int_(number)] = request->num_scheduled_tokens;
    }
    for (const auto& request : scheduler_.finish_step()) {
      const auto number = static_cast<Numbered&>(*request).number;
      tokens[nb::int_(number)] = request->sequence.tokens.back();
      cached[nb::int_(number)] = request->num_cached_tokens;
      if (request->finished) requests_.erase(number);
    }
    nb::typed<nb::dict, nb::str, nb::any> result;
    result["seconds"] = sim::StepTimeModel{}.seconds(work);
    result["scheduled"] = scheduled;
    result["tokens"] = tokens;
    result["cached_tokens"] = cached;
    result["events"] = take_events();
    return result;
  }

  bool has_work() const { return scheduler_.has_work(); }
  bool reset_prefix_cache(bool preempt_running) { return scheduler_.reset_prefix_cache(preempt_running); }
  std::size_t num_waiting() const { return scheduler_.num_waiting(); }
  std::size_t num_running() const { return scheduler_.num_running(); }
  double kv_usage() const { return scheduler_.kv_usage(); }
  std::int64_t num_preemptions() const { return scheduler_.counters().preemptions; }

 private:
  struct Numbered final : sim::Request {
    using Request::Request;
    std::int64_t number = 0;
  };

  nb::list take_events() {
    sim::KvEvents& events = scheduler_.blocks().events();
    nb::list result;
    for (const sim::KvEvent& event : events.events) {
      nb::list hashes;
      for (std::size_t i = 0; i < event.num_hashes; ++i) hashes.append(events.hashes[event.first_hash + i]);
      if (event.kind == sim::KvEvent::Kind::kStored) {
        const nb::object parent = event.has_parent ? nb::object(nb::int_(event.parent)) : nb::none();
        result.append(nb::make_tuple("BlockStored", hashes, parent));
      } else if (event.kind == sim::KvEvent::Kind::kRemoved) {
        result.append(nb::make_tuple("BlockRemoved", hashes, nb::none()));
      } else {
        result.append(nb::make_tuple("AllBlocksCleared", hashes, nb::none()));
      }
    }
    events.clear();
    return result;
  }

  sim::Scheduler scheduler_;
  std::unordered_map<std::int64_t, std::shared_ptr<Numbered>> requests_;
  std::int64_t next_number_ = 0;
};

void bind_engine(nb::module_& m) {
  const sim::BlockManagerOptions blocks;
  const sim::SchedulerOptions scheduler;
  nb::class_<Engine>(
      m, "SimEngine",
      "The simulated worker's engine alone, in virtual time: nothing sleeps, each step() is one step.\n\n"
      "Raises ValueError for options that make no sense together.")
      .def(
          "__init__",
          [](Engine* self, std::int32_t num_blocks, std::int32_t block_size, std::int32_t max_num_seqs,
             std::int32_t max_num_batched_tokens, std::int32_t max_model_len, std::uint32_t vocab_size,
             std::uint64_t seed) {
            new (self) Engine({max_num_seqs, max_num_batched_tokens, max_model_len, vocab_size},
                              {num_blocks, block_size, true, true, seed});
          },
          nb::kw_only(), nb::arg("num_blocks") = blocks.num_blocks, nb::arg("block_size") = blocks.block_size,
          nb::arg("max_num_seqs") = scheduler.max_num_seqs,
          nb::arg("max_num_batched_tokens") = scheduler.max_num_batched_tokens,
          nb::arg("max_model_len") = scheduler.max_model_len, nb::arg("vocab_size") = scheduler.vocab_size,
          nb::arg("seed") = 0)
      .def("add", &Engine::add, nb::arg("prompt"), nb::arg("max_tokens"), nb::arg("seed") = 0,
           "Queues a request and returns its number.  ValueError when it can never fit.")
      .def("cancel", &Engine::cancel, nb::arg("number"), "Takes a request out that is not finished.")
      .def("step", &Engine::step,
           "Computes one step.  Returns a dict: 'seconds' it would take with the default timing model, 'scheduled' "
           "(request number -> tokens computed), 'tokens' (request number -> token generated), 'cached_tokens' (of "
           "the same requests), 'events' (list of (type, block hashes, parent hash or None)).")
      .def("reset_prefix_cache", &Engine::reset_prefix_cache, nb::arg("preempt_running") = false,
           "Forgets all cached prefixes; False while requests hold blocks.")
      .def_prop_ro("has_work", &Engine::has_work, "Whether a request is waiting or running.")
      .def_prop_ro("num_waiting", &Engine::num_waiting, "Requests queued.")
      .def_prop_ro("num_running", &Engine::num_running, "Requests in the batch.")
      .def_prop_ro("kv_usage", &Engine::kv_usage, "Share of the KV cache in use, 0 to 1.")
      .def_prop_ro("num_preemptions", &Engine::num_preemptions, "Preemptions since the start.");
}

}  // namespace

void bind_sim(nb::module_& m) {
  using sim::Worker;
  using sim::WorkerOptions;
  bind_engine(m);
  m.def(
      "sim_tokenize",
      [](std::string_view text, sim::Token vocab_size) {
        if (vocab_size <= sim::kFirstPlainToken) throw nb::value_error("vocab_size must be above 3");
        return sim::tokenize(text, vocab_size);
      },
      nb::arg("text"), nb::arg("vocab_size") = sim::SchedulerOptions{}.vocab_size,
      "The token ids that a simulated worker reads in a text: 'w123' is 123, any other word a hash.");
  const WorkerOptions defaults;

  nb::class_<Worker>(m, "SimWorker",
                     "A simulated vLLM worker inside this process: an engine in real time behind HTTP and ZMQ.\n\n"
                     "Raises ValueError for options that make no sense together and RuntimeError when an address is "
                     "taken; the message begins with the option's name.")
      .def(
          "__init__",
          [](Worker* self, const std::string& host, std::uint16_t port, const std::string& kv_events_endpoint,
             const std::string& replay_endpoint, const std::string& load_endpoint, const std::string& topic,
             const std::string& model, std::int32_t block_size, std::int32_t num_blocks, std::int32_t max_num_seqs,
             std::int32_t max_num_batched_tokens, std::int32_t max_model_len, std::uint32_t vocab_size,
             double time_scale, std::uint64_t seed, bool prefix_caching, bool array_events, bool byte_hashes,
             std::size_t replay_buffer, double step_s, double prefill_token_s, double attention_pair_s,
             double decode_sequence_s, bool debug) {
            WorkerOptions options;
            options.host = host;
            options.port = port;
            options.kv_events_endpoint = kv_events_endpoint;
            options.replay_endpoint = replay_endpoint;
            options.load_endpoint = load_endpoint;
            options.topic = topic;
            options.model = model;
            options.replay_buffer = replay_buffer;
            options.array_events = array_events;
            options.byte_hashes = byte_hashes;
            options.debug = debug;
            options.blocks = {num_blocks, block_size, prefix_caching, !kv_events_endpoint.empty(), seed};
            options.scheduler = {max_num_seqs, max_num_batched_tokens, max_model_len, vocab_size};
            options.time = {.step = step_s,
                            .prefill_token = prefill_token_s,
                            .attention_pair = attention_pair_s,
                            .decode_sequence = decode_sequence_s,
                            .scale = time_scale,
                            .decode_pair = attention_pair_s};
            nb::gil_scoped_release unlocked;
            new (self) Worker(options);
          },
          nb::kw_only(), nb::arg("host") = defaults.host, nb::arg("port") = 0, nb::arg("kv_events_endpoint") = "",
          nb::arg("replay_endpoint") = "", nb::arg("load_endpoint") = "", nb::arg("topic") = defaults.topic,
          nb::arg("model") = defaults.model, nb::arg("block_size") = defaults.blocks.block_size,
          nb::arg("num_blocks") = defaults.blocks.num_blocks, nb::arg("max_num_seqs") = defaults.scheduler.max_num_seqs,
          nb::arg("max_num_batched_tokens") = defaults.scheduler.max_num_batched_tokens,
          nb::arg("max_model_len") = defaults.scheduler.max_model_len,
          nb::arg("vocab_size") = defaults.scheduler.vocab_size, nb::arg("time_scale") = defaults.time.scale,
          nb::arg("seed") = 0, nb::arg("prefix_caching") = true, nb::arg("array_events") = false,
          nb::arg("byte_hashes") = false, nb::arg("replay_buffer") = defaults.replay_buffer,
          nb::arg("step_s") = defaults.time.step, nb::arg("prefill_token_s") = defaults.time.prefill_token,
          nb::arg("attention_pair_s") = defaults.time.attention_pair,
          nb::arg("decode_sequence_s") = defaults.time.decode_sequence, nb::arg("debug") = false)
      .def_prop_ro("port", &Worker::port, "TCP port of the HTTP server.")
      .def_prop_ro("kv_events_endpoint", &Worker::kv_events_endpoint, "Bound ZMQ endpoint, or '' when off.")
      .def_prop_ro("replay_endpoint", &Worker::replay_endpoint, "Bound ZMQ endpoint, or '' when off.")
      .def_prop_ro("load_endpoint", &Worker::load_endpoint, "Bound ZMQ endpoint, or '' when off.")
      .def("stop", &Worker::stop, nb::call_guard<nb::gil_scoped_release>(),
           "Drops what is running and frees the ports.  May be called again.")
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def(
          "__exit__",
          [](Worker& self, nb::handle, nb::handle, nb::handle) {
            nb::gil_scoped_release unlocked;
            self.stop();
          },
          nb::arg("type").none(), nb::arg("value").none(), nb::arg("traceback").none());
}

}  // namespace kvrouter::python
