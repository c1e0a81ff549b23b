// Arguments by name: a table has a row per field of a struct, and what Python passes must be
// exactly those. Tensors come as addresses, None or 0 where there is none.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "args.h"
#include "responses.h"

namespace dcpo::bind {

namespace py = pybind11;

template <class T>
void assign(T& field, py::handle value) {
  field = value.cast<T>();
}
template <class T>
void assign(T*& field, py::handle value) {
  field = value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

// (address, per_batch, batch_stride, row_stride)
inline void assign(View& field, py::handle value) {
  const auto [data, per_batch, batch_stride, row_stride] =
      value.cast<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>();
  field = {reinterpret_cast<void*>(data), per_batch, batch_stride, row_stride};
}
inline void assign(DType& field, py::handle value) {
  field = static_cast<DType>(value.cast<int>());
}

template <class Args>
struct Field {
  const char* name;
  void (*set)(Args& args, py::handle value);
  mutable PyObject* key = nullptr;  // the name as Python has it, made once
};

// A row: a member by its own name.
#define DCPO_FIELD(Args, name) \
  {#name, [](Args& a, py::handle value) { dcpo::bind::assign(a.name, value); }}

// TypeError for a name that is missing, unknown, or whose value is of no use.
template <class Args, size_t n>
void fill(Args& args, const Field<Args> (&table)[n], const py::dict& given) {
  for (const Field<Args>& field : table) {
    if (!field.key) field.key = PyUnicode_InternFromString(field.name);
    PyObject* value = PyDict_GetItem(given.ptr(), field.key);
    if (!value) throw py::type_error(std::string("missing argument ") + field.name);
    try {
      field.set(args, value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("argument ") + field.name + " can't be " +
                           py::repr(value).cast<std::string>());
    }
  }
  if (given.size() == n) return;
  for (const auto& item : given) {
    const std::string name = py::str(item.first);
    bool known = false;
    for (const Field<Args>& field : table) known = known || name == field.name;
    if (!known) throw py::type_error("unknown argument " + name);
  }
}

#define FIELD(name) DCPO_FIELD(Objective, name)
inline const Field<Objective> kObjectiveFields[] = {
    FIELD(surrogate),    FIELD(divergence),      FIELD(kl_estimator), FIELD(old_kl_estimator),
    FIELD(rollout_mode), FIELD(score_centering), FIELD(eps_low),      FIELD(eps_high),
    FIELD(ratio_max),    FIELD(ratio_cap),       FIELD(floor_low),    FIELD(floor_high),
    FIELD(power_low),    FIELD(power_high),      FIELD(limit_low),    FIELD(limit_high),
    FIELD(kl_coef),      FIELD(old_kl_coef),     FIELD(entropy_coef), FIELD(penalty_coef),
    FIELD(rollout_low),  FIELD(rollout_high),
};
#undef FIELD

#define BATCH                                                                       \
  FIELD(rows), FIELD(vocab), FIELD(dtype), FIELD(temperature), FIELD(temperatures), \
      FIELD(softcap), FIELD(logits), FIELD(target_ids)

#define FIELD(name) DCPO_FIELD(FusedArgs, name)
inline const Field<FusedArgs> kFusedFields[] = {
    BATCH,
    FIELD(gradient),
    FIELD(topk_ids),
    FIELD(topk_logprobs),
    FIELD(k),
    FIELD(old_logits),
    FIELD(old_dtype),
    FIELD(objective),
    FIELD(old_logprobs),
    FIELD(advantages),
    FIELD(weights),
    FIELD(ref_logprobs),
    FIELD(importance_weights),
    FIELD(log_ratio),
    FIELD(rollout_logprobs),
    FIELD(entropy_weights),
    FIELD(token_loss),
    FIELD(logprobs),
    FIELD(entropy),
    FIELD(ratio),
    FIELD(clipped),
    FIELD(has_gradient),
};
#undef FIELD

#define FIELD(name) DCPO_FIELD(StatsArgs, name)
inline const Field<StatsArgs> kStatsFields[] = {
    BATCH, FIELD(k), FIELD(mask), FIELD(logprobs), FIELD(entropy), FIELD(row_max), FIELD(log_sum),
};
#undef FIELD

#define FIELD(name) DCPO_FIELD(GradientArgs, name)
inline const Field<GradientArgs> kGradientFields[] = {
    BATCH,          FIELD(k), FIELD(gradient), FIELD(row_max), FIELD(log_sum),
    FIELD(entropy), FIELD(g), FIELD(h),        FIELD(factor),
};
#undef FIELD
#undef BATCH

#define FIELD(name) DCPO_FIELD(MultiplyArgs, name)
inline const Field<MultiplyArgs> kMultiplyFields[] = {
    FIELD(rows), FIELD(vocab), FIELD(dtype), FIELD(x), FIELD(factor),
};
#undef FIELD

#define FIELD(name) DCPO_FIELD(Grouping, name)
#define TOTAL(name)                                                 \
  {#name, [](Grouping& g, py::handle value) {                       \
     g.name = value.is_none() ? kAsCounted : value.cast<int64_t>(); \
   }}
inline const Field<Grouping> kGroupingFields[] = {
    FIELD(mask),
    FIELD(lengths),
    FIELD(response_lengths),
    FIELD(weights),
    FIELD(aggregation),
    TOTAL(num_responses),
    TOTAL(num_tokens),
    TOTAL(max_length),
    FIELD(num_responses_on_device),
    FIELD(num_tokens_on_device),
    FIELD(max_length_on_device),
    FIELD(skip_zero),
    FIELD(skip_by_response),
    FIELD(skip_whole_responses),
};
#undef TOTAL
#undef FIELD

#define FIELD(name) DCPO_FIELD(Responses, name)
inline const Field<Responses> kResponsesFields[] = {
    FIELD(weights),
    FIELD(mask),
    FIELD(offsets),
    FIELD(lengths),
};
#undef FIELD

// A list of addresses.
template <class T>
void assign_all(T* (&fields)[kMaxValues], int& count, py::handle value) {
  const auto list = value.cast<py::list>();
  if (list.size() > kMaxValues)
    throw py::type_error("at most " + std::to_string(kMaxValues) + " values, got " +
                         std::to_string(list.size()));
  count = static_cast<int>(list.size());
  for (int k = 0; k < count; ++k) assign(fields[k], list[k]);
}

#define FIELD(name) DCPO_FIELD(TokenWeightsArgs, name)
#define ROW(name, ...) {#name, [](TokenWeightsArgs& a, py::handle value) { __VA_ARGS__; }}
inline const Field<TokenWeightsArgs> kTokenWeightsFields[] = {
    FIELD(rows),
    FIELD(count),
    ROW(grouping, fill(a.grouping, kGroupingFields, value.cast<py::dict>())),
    ROW(responses, fill(a.responses, kResponsesFields, value.cast<py::dict>())),
    ROW(values, assign_all(a.values, a.num_values, value)),
    ROW(spread, assign_all(a.spread, a.num_values, value)),
};
#undef ROW
#undef FIELD

#define FIELD(name) DCPO_FIELD(DecideArgs, name)
inline const Field<DecideArgs> kDecideFields[] = {
    FIELD(rows),
    FIELD(count),
    FIELD(logprobs),
    FIELD(entropy),
    FIELD(objective),
    FIELD(old_logprobs),
    FIELD(advantages),
    FIELD(weights),
    FIELD(by_response),
    FIELD(spread),
    FIELD(ref_logprobs),
    FIELD(importance_weights),
    FIELD(log_ratio),
    FIELD(rollout_logprobs),
    FIELD(entropy_weights),
    FIELD(offsets),
    FIELD(lengths),
    FIELD(token_loss),
    FIELD(ratio),
    FIELD(clipped),
    FIELD(g),
    FIELD(h),
};
#undef FIELD

#define FIELD(name) DCPO_FIELD(FinishArgs, name)
inline const Field<FinishArgs> kFinishFields[] = {
    FIELD(rows),    FIELD(count),   FIELD(token_loss),    FIELD(logprobs), FIELD(entropy),
    FIELD(ratio),   FIELD(clipped), FIELD(weights),       FIELD(mask),     FIELD(offsets),
    FIELD(lengths), FIELD(loss),    FIELD(response_loss), FIELD(summary),
};
#undef FIELD

// m.name(every field of the table, where to run: `last`, named `names`).
template <class Args, size_t n, class... Last, class... Names>
void launcher(py::module_& m, const char* name, const Field<Args> (&table)[n],
              void (*run)(const Args&, Last...), const Names&... names) {
  m.def(
      name,
      [&table, run](Last... last, const py::kwargs& given) {
        Args args{};
        fill(args, table, given);
        py::gil_scoped_release release;
        run(args, last...);
      },
      py::arg(names)...);
}

// The names behind the codes, and the record of an objective.
inline void objective(py::module_& m) {
  auto names = [&m](const char* name, const auto& list) {
    py::tuple all(std::size(list));
    for (size_t i = 0; i < std::size(list); ++i) all[i] = list[i];
    m.attr(name) = all;
  };
  names("SURROGATES", kSurrogates);
  names("DIVERGENCES", kDivergences);
  names("KL_ESTIMATORS", kKlEstimators);
  names("ROLLOUT_MODES", kRolloutModes);
  names("CLIPPED", kClipped);
  names("AGGREGATIONS", kAggregations);
  py::class_<Objective>(m, "Objective", py::module_local())
      .def(py::init([](const py::kwargs& given) {
        Objective o{};
        fill(o, kObjectiveFields, given);
        return o;
      }));
}

}  // namespace dcpo::bind
