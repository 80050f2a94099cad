#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace kvrouter::python {
void bind_fleet(nb::module_& m);
void bind_hashes(nb::module_& m);
void bind_router(nb::module_& m);
void bind_service(nb::module_& m);
void bind_sim(nb::module_& m);
}  // namespace kvrouter::python

NB_MODULE(_core, m) {
  m.doc() = "The C++ core of kvrouter.";
  m.attr("version") = KVROUTER_VERSION;
  kvrouter::python::bind_hashes(m);
  kvrouter::python::bind_router(m);
  kvrouter::python::bind_service(m);
  kvrouter::python::bind_sim(m);
  kvrouter::python::bind_fleet(m);
}
