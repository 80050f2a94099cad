// The service as kvrouter._core shows it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <tuple>

#include "bindings/arrays.h"
#include "server/service.h"

namespace kvrouter::python {
namespace {

using Spec = std::tuple<std::string, std::string, std::string, std::string, unsigned>;

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3));
}

void construct(Service* self, Router& router, const std::string& host, std::uint16_t port,
               const std::vector<Spec>& workers, const std::string& api_token, const std::string& admin_token,
               bool loopback, const std::string& access_log, std::size_t max_concurrency, std::size_t max_queue,
               double queue_timeout_s, double health_interval_s, double first_byte_timeout_s, double stream_timeout_s,
               std::size_t max_body_bytes, std::size_t max_header_bytes, std::size_t max_connections,
               unsigned breaker_failures, double breaker_open_s, const std::string& tls_cert,
               const std::string& tls_key, const std::string& upstream_ca, const std::string& snapshot_file) {
  ServiceOptions options;
  options.host = host;
  options.port = port;
  for (const auto& [url, kv_events, replay, load, ranks] : workers) {
    options.workers.push_back({url, kv_events, replay, load, ranks});
  }
  options.tokens = {api_token, admin_token, loopback};
  options.access_log = access_log;
  options.snapshot_file = snapshot_file;
  options.http.max_body_bytes = max_body_bytes;
  options.http.max_header_bytes = max_header_bytes;
  options.http.max_connections = max_connections;
  options.tls = {tls_cert, tls_key};
  options.fleet.ca_file = upstream_ca;
  options.fleet.max_concurrency = max_concurrency;
  options.fleet.health_interval = milliseconds(health_interval_s);
  options.fleet.breaker = {breaker_failures, milliseconds(breaker_open_s)};
  options.fleet.upstream.head_timeout = milliseconds(first_byte_timeout_s);
  options.fleet.upstream.body_timeout = milliseconds(stream_timeout_s);
  options.gateway.max_queue = max_queue;
  options.gateway.queue_timeout = milliseconds(queue_timeout_s);
  options.gateway.strip_authorization = !api_token.empty() || !admin_token.empty();
  try {
    new (self) Service(router, options);
  } catch (const std::system_error& error) {
    PyErr_SetString(PyExc_OSError, error.what());
    throw nb::python_error();
  } catch (const std::invalid_argument& error) {
    throw nb::value_error(error.what());
  }
}

}  // namespace

void bind_service(nb::module_& m) {
  nb::class_<Service>(m, "Service", "The service: see src/server/service.h.  Times in seconds.")
      .def("__init__", &construct, nb::arg("router"), nb::kw_only(), nb::arg("host"), nb::arg("port"),
           nb::arg("workers"), nb::arg("api_token") = "", nb::arg("admin_token") = "", nb::arg("loopback") = true,
           nb::arg("access_log") = "", nb::arg("max_concurrency") = 256, nb::arg("max_queue") = 1024,
           nb::arg("queue_timeout_s") = 30.0, nb::arg("health_interval_s") = 1.0,
           nb::arg("first_byte_timeout_s") = 600.0, nb::arg("stream_timeout_s") = 300.0,
           nb::arg("max_body_bytes") = 16 * 1024 * 1024, nb::arg("max_header_bytes") = 16 * 1024,
           nb::arg("max_connections") = 4096, nb::arg("breaker_failures") = 3, nb::arg("breaker_open_s") = 5.0,
           nb::arg("tls_cert") = "", nb::arg("tls_key") = "", nb::arg("upstream_ca") = "",
           nb::arg("snapshot_file") = "", nb::keep_alive<1, 2>())
      .def_prop_ro("port", &Service::port)
      .def("stop", &Service::stop, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace kvrouter::python
