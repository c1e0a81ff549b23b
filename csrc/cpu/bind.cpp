// The CPU kernels for Python.
#include "bind_responses.h"
#include "bind_rows.h"
#include "rows.h"

void bind_cpu(pybind11::module_& m) {
  using namespace dcpo;
  namespace py = pybind11;
  using namespace py::literals;
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
  m.def(
      "cpu_multiply",
      [](int64_t rows, int64_t vocab, int dtype, bind::Address x, const bind::Strides& strides,
         bind::Address factor, int threads) {
        const MultiplyArgs args{bind::shape(rows, vocab, dtype, 1.0f), bind::view(x, strides),
                                bind::at<float>(factor)};
        pybind11::gil_scoped_release release;
        cpu_multiply(args, threads);
      },
      py::kw_only(), "rows"_a, "vocab"_a, "dtype"_a, "x"_a, "strides"_a, "factor"_a, "threads"_a);
}
