// The CPU kernels for Python.
#include "bind_responses.h"
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
  bind::responses(m, "cpu_token_weights", bind::kTokenWeightsFields, cpu_token_weights);
  bind::responses(m, "cpu_decide", bind::kDecideFields, cpu_decide);
  bind::responses(m, "cpu_finish", bind::kFinishFields, cpu_finish);
}
