// token_weights, decide and finish for Python, on a CPU or a GPU.
#pragma once

#include "bind_table.h"
#include "responses.h"

namespace dcpo::bind {

#define FIELD(name) DCPO_FIELD(Grouping, name)
#define TOTAL(name)                                                 \
  {#name, [](Grouping& g, py::handle value) {                       \
     g.name = value.is_none() ? kAsCounted : value.cast<int64_t>(); \
   }}
inline const Field<Grouping> kGroupingFields[] = {
    FIELD(mask),
    FIELD(lengths),
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
#define NUMBER(name) {#name, [](DecideArgs& a, py::handle value) { assign(a.numbers.name, value); }}
inline const Field<DecideArgs> kDecideFields[] = {
    FIELD(rows),
    FIELD(count),
    FIELD(logprobs),
    FIELD(entropy),
    FIELD(old_logprobs),
    FIELD(advantages),
    FIELD(weights),
    FIELD(ref_logprobs),
    NUMBER(surrogate),
    NUMBER(divergence),
    NUMBER(eps_low),
    NUMBER(eps_high),
    NUMBER(ratio_max),
    NUMBER(ratio_cap),
    NUMBER(limit_low),
    NUMBER(limit_high),
    NUMBER(kl_coef),
    NUMBER(entropy_coef),
    NUMBER(penalty_coef),
    FIELD(importance_weights),
    FIELD(by_response),
    FIELD(offsets),
    FIELD(lengths),
    FIELD(token_loss),
    FIELD(ratio),
    FIELD(clipped),
    FIELD(g),
    FIELD(h),
};
#undef NUMBER
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
void responses(py::module_& m, const char* name, const Field<Args> (&table)[n],
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

}  // namespace dcpo::bind
