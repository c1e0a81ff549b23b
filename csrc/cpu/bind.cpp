// The CPU kernels for Python.
#include "bind.h"

#include "dispatch.h"

void bind_cpu(pybind11::module_& m) {
  using namespace dcpo;
  m.def("cpu_isas", cpu_isas);
  m.def("cpu_isa", cpu_isa);
  m.def("cpu_use_isa", cpu_use_isa);
  bind::launcher(m, "cpu_fused", bind::kFusedFields, cpu_fused, "threads");
  bind::launcher(m, "cpu_stats", bind::kStatsFields, cpu_stats, "threads");
  bind::launcher(m, "cpu_gradient", bind::kGradientFields, cpu_gradient, "threads");
  bind::launcher(m, "cpu_multiply", bind::kMultiplyFields, cpu_multiply, "threads");
  bind::launcher(m, "cpu_token_weights", bind::kTokenWeightsFields, cpu_token_weights);
  bind::launcher(m, "cpu_decide", bind::kDecideFields, cpu_decide);
  bind::launcher(m, "cpu_finish", bind::kFinishFields, cpu_finish);
}
