// The CPU kernels for Python.
#include "bind_rows.h"
#include "rows.h"

void bind_cpu(pybind11::module_& m) {
  using namespace dcpo;
  bind::objective(m);
  m.def("cpu_isas", cpu_isas);
  m.def("cpu_isa", cpu_isa);
  m.def("cpu_use_isa", cpu_use_isa);
  bind::fused(m, "cpu_fused", cpu_fused, "threads");
  bind::stats(m, "cpu_stats", cpu_stats, "threads");
  bind::gradient(m, "cpu_gradient", cpu_gradient, "threads");
}
