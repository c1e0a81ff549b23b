// What Python passes to a row kernel, on a CPU or a GPU: raw addresses, sizes and strides, all by
// name. Everything is checked before it comes here (ops/).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/rows.h"

namespace dcpo::bind {

namespace py = pybind11;

using Address = uintptr_t;                              // 0 where there is no tensor
using Strides = std::tuple<int64_t, int64_t, int64_t>;  // View's, in elements

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline View view(Address data, const Strides& strides) {
  return {at<void>(data), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

inline Shape shape(int64_t rows, int64_t vocab, int dtype, float temperature) {
  return {rows, vocab, static_cast<DType>(dtype), temperature};
}

inline void objective(py::module_& m) {
  py::class_<Objective>(m, "Objective", py::module_local())
      .def(py::init([](int surrogate, int divergence, float eps_low, float eps_high,
                       float ratio_max, float ratio_cap, float limit_low, float limit_high,
                       float kl_coef, float entropy_coef, float penalty_coef) {
        return Objective{surrogate, divergence, eps_low, eps_high,     ratio_max,   ratio_cap,
                         limit_low, limit_high, kl_coef, entropy_coef, penalty_coef};
      }));
}

// m.name(every member of FusedArgs, where to run: `last`, named `names`).
template <class... Last, class... Names>
void fused(py::module_& m, const char* name, void (*run)(const FusedArgs&, Last...),
           const Names&... names) {
  m.def(
      name,
      [run](int64_t rows, int64_t vocab, int dtype, float temperature, Address logits,
            const Strides& logits_strides, Address gradient, const Strides& gradient_strides,
            Address target_ids, Address old_logprobs, Address advantages, Address weights,
            Address ref_logprobs, Address importance_weights, Address topk_ids,
            Address topk_logprobs, int64_t k, Address old_logits, const Strides& old_logits_strides,
            const Objective& objective, bool skip_zero_advantage, Address token_loss,
            Address logprobs, Address entropy, Address ratio, Address clipped, Last... last) {
        const FusedArgs args{shape(rows, vocab, dtype, temperature),
                             view(logits, logits_strides),
                             view(gradient, gradient_strides),
                             at<int64_t>(target_ids),
                             at<float>(old_logprobs),
                             at<float>(advantages),
                             at<float>(weights),
                             at<float>(ref_logprobs),
                             at<float>(importance_weights),
                             at<int64_t>(topk_ids),
                             at<float>(topk_logprobs),
                             k,
                             view(old_logits, old_logits_strides),
                             objective,
                             skip_zero_advantage,
                             at<float>(token_loss),
                             at<float>(logprobs),
                             at<float>(entropy),
                             at<float>(ratio),
                             at<int8_t>(clipped)};
        py::gil_scoped_release release;
        run(args, last...);
      },
      py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("dtype"), py::arg("temperature"),
      py::arg("logits"), py::arg("logits_strides"), py::arg("gradient"),
      py::arg("gradient_strides"), py::arg("target_ids"), py::arg("old_logprobs"),
      py::arg("advantages"), py::arg("weights"), py::arg("ref_logprobs"),
      py::arg("importance_weights"), py::arg("topk_ids"), py::arg("topk_logprobs"), py::arg("k"),
      py::arg("old_logits"), py::arg("old_logits_strides"), py::arg("objective"),
      py::arg("skip_zero_advantage"), py::arg("token_loss"), py::arg("logprobs"),
      py::arg("entropy"), py::arg("ratio"), py::arg("clipped"), py::arg(names)...);
}

template <class... Last, class... Names>
void stats(py::module_& m, const char* name, void (*run)(const StatsArgs&, Last...),
           const Names&... names) {
  m.def(
      name,
      [run](int64_t rows, int64_t vocab, int dtype, float temperature, Address logits,
            const Strides& logits_strides, Address target_ids, Address counts, Address logprobs,
            Address entropy, Address row_max, Address log_sum, Last... last) {
        const StatsArgs args{shape(rows, vocab, dtype, temperature),
                             view(logits, logits_strides),
                             at<int64_t>(target_ids),
                             at<uint8_t>(counts),
                             at<float>(logprobs),
                             at<float>(entropy),
                             at<float>(row_max),
                             at<float>(log_sum)};
        py::gil_scoped_release release;
        run(args, last...);
      },
      py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("dtype"), py::arg("temperature"),
      py::arg("logits"), py::arg("logits_strides"), py::arg("target_ids"), py::arg("counts"),
      py::arg("logprobs"), py::arg("entropy"), py::arg("row_max"), py::arg("log_sum"),
      py::arg(names)...);
}

template <class... Last, class... Names>
void gradient(py::module_& m, const char* name, void (*run)(const GradientArgs&, Last...),
              const Names&... names) {
  m.def(
      name,
      [run](int64_t rows, int64_t vocab, int dtype, float temperature, Address logits,
            const Strides& logits_strides, Address gradient, const Strides& gradient_strides,
            Address target_ids, Address row_max, Address log_sum, Address entropy, Address g,
            Address h, Last... last) {
        const GradientArgs args{shape(rows, vocab, dtype, temperature),
                                view(logits, logits_strides),
                                view(gradient, gradient_strides),
                                at<int64_t>(target_ids),
                                at<float>(row_max),
                                at<float>(log_sum),
                                at<float>(entropy),
                                at<float>(g),
                                at<float>(h)};
        py::gil_scoped_release release;
        run(args, last...);
      },
      py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("dtype"), py::arg("temperature"),
      py::arg("logits"), py::arg("logits_strides"), py::arg("gradient"),
      py::arg("gradient_strides"), py::arg("target_ids"), py::arg("row_max"), py::arg("log_sum"),
      py::arg("entropy"), py::arg("g"), py::arg("h"), py::arg(names)...);
}

}  // namespace dcpo::bind
