// The router as kvrouter._core shows it.  Waiting and deciding happen without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <system_error>

#include "bindings/arrays.h"
#include "kvrouter/router.h"
#include "replica/snapshot.h"
#include "server/router_api.h"

namespace kvrouter::python {
namespace {

std::size_t checked_num_tokens(std::int64_t num_tokens) {
  if (num_tokens <= 0) throw nb::value_error("num_tokens must be positive");
  return static_cast<std::size_t>(num_tokens);
}

RouterOptions make_options(std::int64_t block_size, const std::vector<std::string>& kv_events,
                           const std::vector<std::string>& load, const std::vector<std::string>& http,
                           const std::vector<std::string>& replay, const std::string& policy, std::uint64_t seed,
                           double startup_grace_s, double metrics_interval_s, const std::string& ca_file) {
  if (block_size < 1) throw nb::value_error("block_size must be at least 1");
  if (kv_events.size() != load.size() || load.size() != http.size() ||
      (!replay.empty() && replay.size() != load.size())) {
    throw nb::value_error("kv_events, load, http and replay (if it is given) must have one entry a worker each");
  }
  RouterOptions options;
  options.block_size = static_cast<std::size_t>(block_size);
  for (std::size_t i = 0; i < kv_events.size(); ++i) {
    options.workers.push_back(
        {.kv_events = kv_events[i], .load = load[i], .http = http[i], .replay = replay.empty() ? "" : replay[i]});
  }
  options.ca_file = ca_file;
  options.policy = policy;
  options.seed = seed;
  const auto milliseconds = [](double seconds) {
    return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3));
  };
  options.startup_grace = milliseconds(startup_grace_s);
  options.metrics_interval = milliseconds(metrics_interval_s);
  return options;
}

// RouterOptions' own checks are ValueError in Python.
void construct(Router* self, RouterOptions options) {
  try {
    new (self) Router(std::move(options));
  } catch (const std::invalid_argument& error) {
    throw nb::value_error(error.what());
  }
}

// Signatures for the stub, which cannot know the element types of a tuple.
#define KVROUTER_ARRAY(type) "Annotated[NDArray[numpy." type "], dict(shape=(None,))]"
#define KVROUTER_CHOICES "tuple[" KVROUTER_ARRAY("uint32") ", " KVROUTER_ARRAY("uint32")
#define KVROUTER_FROM_HASHES "(self, hashes: list[Any], num_tokens: object) -> " KVROUTER_CHOICES
#define KVROUTER_FROM_TOKENS \
  "(self, tokens: object, lengths: object | None = None, lora_name: str | None = None) -> " KVROUTER_CHOICES
constexpr const char* kChooseBatch = "def choose_batch" KVROUTER_FROM_HASHES "]";
constexpr const char* kChooseBatchForTokens = "def choose_batch_for_tokens" KVROUTER_FROM_TOKENS "]";
constexpr const char* kDispatchBatch = "def dispatch_batch" KVROUTER_FROM_HASHES ", " KVROUTER_ARRAY("uint64") "]";
constexpr const char* kDispatchBatchForTokens =
    "def dispatch_batch_for_tokens" KVROUTER_FROM_TOKENS ", " KVROUTER_ARRAY("uint64") "]";

// (workers, overlap_blocks) of a batch.
nb::tuple to_arrays(const std::vector<Choice>& choices) {
  std::vector<std::uint32_t> workers, overlap_blocks;
  for (const Choice& choice : choices) {
    workers.push_back(choice.worker);
    overlap_blocks.push_back(choice.overlap_blocks);
  }
  return nb::make_tuple(to_numpy(std::move(workers)), to_numpy(std::move(overlap_blocks)));
}

// The same, and tickets.
nb::tuple with_tickets(const std::vector<Choice>& choices) {
  std::vector<std::uint64_t> tickets;
  for (const Choice& choice : choices) tickets.push_back(choice.ticket);
  const nb::tuple arrays = to_arrays(choices);
  return nb::make_tuple(arrays[0], arrays[1], to_numpy(std::move(tickets)));
}

std::vector<Choice> decide_batch(Router& router, const nb::list& hashes, nb::handle num_tokens) {
  const std::vector<std::uint64_t> tokens = read_counts(num_tokens, "num_tokens");
  if (tokens.size() != nb::len(hashes)) {
    throw nb::value_error(("hashes has " + std::to_string(nb::len(hashes)) + " entries, num_tokens has " +
                           std::to_string(tokens.size()) + ": one each a request")
                              .c_str());
  }
  std::vector<HashView> views;
  std::vector<BatchRequest> requests;
  views.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i >= nb::len(hashes)) throw nb::value_error("hashes changed while it was read");
    views.emplace_back(hashes[i], "hashes");
    requests.push_back({views.back().span(), tokens[i]});
  }
  std::vector<Choice> choices(requests.size());
  const nb::gil_scoped_release release;
  router.choose_batch(requests, choices);
  return choices;
}

std::vector<Choice> decide_batch_for_tokens(Router& router, nb::handle tokens, nb::handle lengths,
                                            const std::optional<std::string>& lora_name) {
  const TokenBatchView view(tokens, lengths);
  std::vector<Choice> choices(view.spans().size());
  const nb::gil_scoped_release release;
  router.choose_batch_for_tokens(view.spans(), lora_name ? lora_namespace(*lora_name) : 0, choices);
  return choices;
}

nb::tuple choose_batch(Router& router, const nb::list& hashes, nb::handle num_tokens) {
  return to_arrays(decide_batch(router, hashes, num_tokens));
}
nb::tuple choose_batch_for_tokens(Router& router, nb::handle tokens, nb::handle lengths,
                                  const std::optional<std::string>& lora_name) {
  return to_arrays(decide_batch_for_tokens(router, tokens, lengths, lora_name));
}
nb::tuple dispatch_batch(Router& router, const nb::list& hashes, nb::handle num_tokens) {
  return with_tickets(decide_batch(router, hashes, num_tokens));
}
nb::tuple dispatch_batch_for_tokens(Router& router, nb::handle tokens, nb::handle lengths,
                                    const std::optional<std::string>& lora_name) {
  return with_tickets(decide_batch_for_tokens(router, tokens, lengths, lora_name));
}

Decision explain_among(Router& router, nb::handle tokens, const std::vector<std::int64_t>& workers,
                       const std::optional<std::string>& lora_name) {
  if (workers.empty()) throw nb::value_error("workers is empty: somebody has to be chosen");
  std::vector<std::uint8_t> eligible(router.num_workers());
  for (const std::int64_t worker : workers) eligible[checked_worker(router.num_workers(), worker)] = 1;
  const TokenView view(tokens);
  checked_num_tokens(static_cast<std::int64_t>(view.span().size()));
  const nb::gil_scoped_release release;
  return router.explain_for_tokens(view.span(), lora_name ? lora_namespace(*lora_name) : 0, eligible);
}

template <typename T, typename Get>
auto column(const std::vector<WorkerLoad>& loads, Get get) {
  std::vector<T> values;
  for (const WorkerLoad& load : loads) values.push_back(get(load));
  return to_numpy(std::move(values));
}

void bind_decision(nb::module_& m) {
  nb::class_<Decision>(m, "Decision", "The worker chosen for one request, and how every worker scored.")
      .def_prop_ro(
          "worker", [](const Decision& d) { return d.choice.worker; }, "The chosen worker.")
      .def_prop_ro(
          "overlap_blocks", [](const Decision& d) { return d.choice.overlap_blocks; },
          "Leading blocks of the request that the chosen worker holds.")
      .def_prop_ro(
          "ticket", [](const Decision& d) { return d.choice.ticket; },
          "For first_token() and complete(); 0 where the policy keeps no account of what is in flight.")
      .def_prop_ro(
          "num_blocks", [](const Decision& d) { return d.num_blocks; }, "Full blocks of the request.")
      .def_prop_ro("num_tokens", [](const Decision& d) { return d.num_tokens; })
      // The policy is said because that of properties, reference_internal, does not go with arrays that own their data.
      .def_prop_ro(
          "scores", [](const Decision& d) { return to_numpy(d.scores); }, nb::rv_policy::move,
          "float64, (num_workers,): the higher the better.")
      .def_prop_ro(
          "overlaps", [](const Decision& d) { return to_numpy(d.overlap_blocks); }, nb::rv_policy::move,
          "uint32, (num_workers,): leading blocks held by each worker.")
      .def_prop_ro(
          "kv_usages",
          [](const Decision& d) { return column<double>(d.loads, [](auto& load) { return load.kv_usage; }); },
          nb::rv_policy::move, "float64, (num_workers,), 0 to 1.")
      .def_prop_ro(
          "waitings",
          [](const Decision& d) { return column<std::int64_t>(d.loads, [](auto& load) { return load.waiting; }); },
          nb::rv_policy::move, "int64, (num_workers,): requests queued, as the policy saw them.")
      .def("__repr__", [](const Decision& d) {
        return "Decision(worker=" + std::to_string(d.choice.worker) +
               ", overlap_blocks=" + std::to_string(d.choice.overlap_blocks) +
               ", num_blocks=" + std::to_string(d.num_blocks) + ")";
      });
}

}  // namespace

void bind_router(nb::module_& m) {
  bind_decision(m);
  m.def("policy_names", &policy_names, "The policies there are.");

  nb::class_<Router>(m, "Router", "The router itself; kvrouter.KvRouter is its Python face.")
      .def(
          "__init__",
          [](Router* self, std::int64_t block_size, const std::vector<std::string>& kv_events,
             const std::vector<std::string>& load, const std::vector<std::string>& http,
             const std::vector<std::string>& replay, const std::string& policy, std::uint64_t seed,
             double startup_grace_s, double metrics_interval_s, const std::string& ca_file,
             std::int64_t index_memory_limit, const std::string& replica_bind,
             const std::vector<std::string>& replica_peers, double replica_timeout_s) {
            RouterOptions options = make_options(block_size, kv_events, load, http, replay, policy, seed,
                                                 startup_grace_s, metrics_interval_s, ca_file);
            if (index_memory_limit < 0) throw nb::value_error("index_memory_limit must not be negative");
            options.index_memory_limit = static_cast<std::size_t>(index_memory_limit);
            if (!(replica_timeout_s >= 0 && replica_timeout_s <= 3600)) {
              throw nb::value_error("replica_timeout_s must be from 0.5 to 3600 seconds");
            }
            options.replica = {replica_bind, replica_peers,
                               std::chrono::milliseconds(static_cast<std::int64_t>(replica_timeout_s * 1e3))};
            construct(self, std::move(options));
          },
          nb::kw_only(), nb::arg("block_size"), nb::arg("kv_events"), nb::arg("load"), nb::arg("http"),
          nb::arg("replay") = std::vector<std::string>{}, nb::arg("policy") = "linear", nb::arg("seed") = 0,
          nb::arg("startup_grace_s") = 5.0, nb::arg("metrics_interval_s") = 0.25, nb::arg("ca_file") = "",
          nb::arg("index_memory_limit") = 0, nb::arg("replica_bind") = "",
          nb::arg("replica_peers") = std::vector<std::string>{}, nb::arg("replica_timeout_s") = 3.0)
      .def("start", &Router::start, nb::arg("kv_events") = true, nb::call_guard<nb::gil_scoped_release>())
      .def("stop", &Router::stop, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("running", &Router::running)
      .def_prop_ro("num_workers", &Router::num_workers)
      .def_prop_ro("block_size", &Router::block_size)
      .def_prop_ro("policy", &Router::policy)
      .def(
          "choose",
          [](Router& self, nb::handle hashes, std::int64_t num_tokens) {
            const std::size_t tokens = checked_num_tokens(num_tokens);
            const HashView view(hashes, "hashes");
            const nb::gil_scoped_release release;
            return self.choose(view.span(), tokens).worker;
          },
          nb::arg("hashes"), nb::arg("num_tokens"))
      .def(
          "choose_for_tokens",
          [](Router& self, nb::handle tokens, const std::optional<std::string>& lora_name) {
            const TokenView view(tokens);
            checked_num_tokens(static_cast<std::int64_t>(view.span().size()));
            const nb::gil_scoped_release release;
            return self.choose_for_tokens(view.span(), lora_name ? lora_namespace(*lora_name) : 0).worker;
          },
          nb::arg("tokens"), nb::arg("lora_name") = nb::none())
      .def(
          "explain",
          [](Router& self, nb::handle hashes, std::int64_t num_tokens) {
            const std::size_t tokens = checked_num_tokens(num_tokens);
            const HashView view(hashes, "hashes");
            const nb::gil_scoped_release release;
            return self.explain(view.span(), tokens);
          },
          nb::arg("hashes"), nb::arg("num_tokens"))
      .def(
          "explain_for_tokens",
          [](Router& self, nb::handle tokens, const std::optional<std::string>& lora_name) {
            const TokenView view(tokens);
            checked_num_tokens(static_cast<std::int64_t>(view.span().size()));
            const nb::gil_scoped_release release;
            return self.explain_for_tokens(view.span(), lora_name ? lora_namespace(*lora_name) : 0);
          },
          nb::arg("tokens"), nb::arg("lora_name") = nb::none())
      .def("explain_among", &explain_among, nb::arg("tokens"), nb::arg("workers"), nb::arg("lora_name") = nb::none(),
           "explain_for_tokens() where only these workers may be chosen.  ValueError when there is none.")
      .def("choose_batch", &choose_batch, nb::arg("hashes"), nb::arg("num_tokens"), nb::sig(kChooseBatch),
           "Decides for a batch at once.\n\n"
           "hashes: for each request the hashes of its full blocks, 1-D uint64 array or list.\n"
           "num_tokens: of each request, (B,).\n"
           "Returns (workers, overlap_blocks), uint32, (B,) each.  ValueError when the lengths differ.")
      .def("choose_batch_for_tokens", &choose_batch_for_tokens, nb::arg("tokens"), nb::arg("lengths") = nb::none(),
           nb::arg("lora_name") = nb::none(), nb::sig(kChooseBatchForTokens),
           "The same from token ids.\n\n"
           "tokens: 2-D integer array or CPU tensor, (B, S), or a list of B sequences.\n"
           "lengths: tokens of each request without its padding, (B,); None: all.")
      .def("dispatch_batch", &dispatch_batch, nb::arg("hashes"), nb::arg("num_tokens"), nb::sig(kDispatchBatch),
           "choose_batch(), and uint64 tickets for first_token() and complete(), (B,).")
      .def("dispatch_batch_for_tokens", &dispatch_batch_for_tokens, nb::arg("tokens"), nb::arg("lengths") = nb::none(),
           nb::arg("lora_name") = nb::none(), nb::sig(kDispatchBatchForTokens),
           "choose_batch_for_tokens(), and uint64 tickets for first_token() and complete(), (B,).")
      .def("first_token", &Router::first_token, nb::arg("ticket"), nb::call_guard<nb::gil_scoped_release>(),
           "The request has got its first token.  False for a ticket that is not known (any more).")
      .def(
          "complete",
          [](Router& self, Ticket ticket, std::int64_t output_tokens, double first_token_s) {
            const nb::gil_scoped_release release;
            return self.complete(ticket, {output_tokens, first_token_s});
          },
          nb::arg("ticket"), nb::arg("output_tokens") = -1, nb::arg("first_token_s") = 0.0,
          "The request is finished, or given up.  output_tokens -1 and first_token_s 0: not known.")
      .def(
          "report_hit",
          [](Router& self, std::int64_t worker, std::int64_t overlap_blocks, std::int64_t num_tokens,
             std::int64_t cached_tokens, nb::handle hashes) {
            const WorkerId id = checked_worker(self.num_workers(), worker);
            if (overlap_blocks < 0 || cached_tokens < 0) {
              throw nb::value_error("overlap_blocks and cached_tokens must not be negative");
            }
            HitReport report{static_cast<std::uint32_t>(std::min<std::int64_t>(overlap_blocks, UINT32_MAX)),
                             checked_num_tokens(num_tokens), static_cast<std::size_t>(cached_tokens)};
            if (hashes.is_none()) return self.report_hit(id, report);
            const HashView view(hashes, "hashes");
            report.blocks = view.span();
            const nb::gil_scoped_release release;
            self.report_hit(id, report);
          },
          nb::arg("worker"), nb::arg("overlap_blocks"), nb::arg("num_tokens"), nb::arg("cached_tokens"),
          nb::arg("hashes") = nb::none(), "What the worker's hit on a request was, beside what was predicted.")
      .def("round_robin", &Router::round_robin)
      .def(
          "reset",
          [](Router& self, std::optional<std::int64_t> worker, bool until_cleared) {
            const std::optional<WorkerId> id =
                worker ? std::optional(checked_worker(self.num_workers(), *worker)) : std::nullopt;
            const nb::gil_scoped_release release;
            self.reset(id, until_cleared ? Router::Reset::kUntilCleared : Router::Reset::kNow);
          },
          nb::arg("worker") = nb::none(), nb::arg("until_cleared") = false)
      .def(
          "set_worker",
          [](Router& self, std::int64_t worker, const std::string& kv_events, const std::string& load,
             const std::string& http, const std::string& replay) {
            const WorkerId id = checked_worker(self.num_workers(), worker);
            const nb::gil_scoped_release release;
            self.set_worker(id, {.kv_events = kv_events, .load = load, .http = http, .replay = replay});
          },
          nb::arg("worker"), nb::kw_only(), nb::arg("kv_events") = "", nb::arg("load") = "", nb::arg("http") = "",
          nb::arg("replay") = "",
          "Listens to these endpoints for the worker from now on, and forgets what was known of it.")
      .def(
          "update_load",
          [](Router& self, std::int64_t worker, double kv_usage, std::int64_t waiting, std::int64_t running) {
            self.loads().update(checked_worker(self.num_workers(), worker), {kv_usage, waiting, running});
          },
          nb::arg("worker"), nb::arg("kv_usage"), nb::arg("waiting"), nb::arg("running") = 0)
      .def(
          "snapshot",
          [](Router& self) {
            std::string bytes;
            {
              const nb::gil_scoped_release release;
              bytes = self.snapshot();
            }
            return nb::bytes(bytes.data(), bytes.size());
          },
          "What is known of the workers' caches, for warm_start(); see kvrouter/router.h.")
      .def(
          "save_snapshot",
          [](Router& self, const std::string& path) {
            const nb::gil_scoped_release release;
            try {
              const std::string bytes = self.snapshot();
              write_file_atomically(path, bytes);
              return bytes.size();
            } catch (const std::system_error& error) {
              const nb::gil_scoped_acquire acquire;
              PyErr_SetString(PyExc_OSError, error.what());
              throw nb::python_error();
            }
          },
          nb::arg("path"),
          "Writes snapshot() to a file, as a whole or not at all; its size.  OSError when it cannot be.")
      .def(
          "warm_start",
          [](Router& self, nb::bytes snapshot) {
            const std::span bytes(static_cast<const std::byte*>(snapshot.data()), snapshot.size());
            const nb::gil_scoped_release release;
            return self.warm_start(bytes);
          },
          nb::arg("snapshot"),
          "To be called before start(); the number of workers in it.  ValueError for what is none.")
      .def_prop_ro("index", &Router::index, nb::rv_policy::reference_internal)
      .def(
          "status_json", [](Router& self) { return answer_router_request(self, {"GET", "/workers", "", ""}).body; },
          nb::call_guard<nb::gil_scoped_release>(), "What GET /workers of the router's HTTP API answers.")
      .def(
          "next_notice",
          [](Router& self, double timeout_s) -> std::optional<std::pair<int, std::string>> {
            std::optional<RouterNotice> notice;
            {
              const nb::gil_scoped_release release;
              notice = self.next_notice(std::chrono::milliseconds(static_cast<std::int64_t>(timeout_s * 1e3)));
            }
            if (!notice) return std::nullopt;
            return std::pair(static_cast<int>(notice->level), notice->text);
          },
          nb::arg("timeout_s"), "(level, text) with level 0 info, 1 warning, 2 error; or None.");

  nb::class_<RouterApiServer>(m, "RouterApiServer", "Serves a router over HTTP: see src/server/router_api.h.")
      .def(
          "__init__",
          [](RouterApiServer* self, Router& router, const std::string& host, std::uint16_t port) {
            try {
              new (self) RouterApiServer(router, host, port);
            } catch (const std::system_error& error) {
              PyErr_SetString(PyExc_OSError, (host + ":" + std::to_string(port) + ": " + error.what()).c_str());
              throw nb::python_error();
            }
          },
          nb::arg("router"), nb::arg("host"), nb::arg("port"), nb::keep_alive<1, 2>())
      .def_prop_ro("port", &RouterApiServer::port)
      .def("stop", &RouterApiServer::stop, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace kvrouter::python
