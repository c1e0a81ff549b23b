// The operators around the vocabulary kernel on a CPU: plain loops in the order of the rows, sums
// in double. They take some nanoseconds per row, and a row of logits takes microseconds.
#include "responses.h"

#include <algorithm>

namespace dcpo {
namespace {

// Sets the offsets; they never fall and never leave the rows, whatever the lengths are.
void lay_out(const TokenWeightsArgs& a) {
  int64_t* offsets = a.responses.offsets;
  int64_t sum = 0;
  offsets[0] = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    sum = wrapping_add(sum, length_of(a, i));
    offsets[i + 1] = std::max(offsets[i], within(sum, a.rows));
  }
}

Counts count(const TokenWeightsArgs& a) {
  Counts c{0, 0, 0};
  for (int64_t i = 0; i < a.count; ++i) {
    int64_t n = 0;
    for (int64_t row = a.responses.offsets[i]; row < a.responses.offsets[i + 1]; ++row)
      n += counts(a.grouping, row);
    a.responses.lengths[i] = whole_length(a.grouping, i, n);
    add(c, a.responses.lengths[i]);
  }
  return c;
}

bool any_live(const Grouping& g, int64_t response, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    if (counts(g, row) && live(g, response, row)) return true;
  return false;
}

}  // namespace

void cpu_token_weights(const TokenWeightsArgs& a) {
  lay_out(a);
  const Counts c = count(a);
  const int64_t* offsets = a.responses.offsets;
  for (int64_t i = 0; i < a.count; ++i) {
    const Grouping& g = a.grouping;
    const float weight = token_weight(g, c, a.responses.lengths[i]);
    const bool whole = g.skip_whole_responses && any_live(g, i, offsets[i], offsets[i + 1]);
    for (int64_t row = offsets[i]; row < offsets[i + 1]; ++row)
      write_token(a, i, row, whole, weight);
  }
  for (int64_t row = offsets[a.count]; row < a.rows; ++row) write_rest(a, row);
}

void cpu_decide(const DecideArgs& a) {
  if (!a.by_response) {
    for (int64_t row = 0; row < a.rows; ++row) decide_row(a, row, nullptr);
    return;
  }
  // The last response takes what rows come after it.
  for (int64_t i = 0; i < std::max<int64_t>(a.count, 1); ++i) {
    const ResponseRows r = rows_of(a, i);
    double sum = 0.0;
    for (int64_t row = r.begin; row < r.end; ++row) sum += log_ratio_of(a, row);
    const float log_ratio = response_log_ratio(a.objective, sum, r.length);
    double pull = 0.0;
    for (int64_t row = r.begin; row < r.last; ++row) {
      const float own = decide_row(a, row, &log_ratio);
      if (row < r.end) pull += own;
    }
    const float share = mean(pull, r.length);
    for (int64_t row = r.begin; a.spread && row < r.last; ++row) spread_to(a, row, share);
  }
}

void cpu_finish(const FinishArgs& a) {
  Summary<double> summary = nothing_read<double>();
  for (int64_t row = 0; row < a.rows; ++row) add(summary, of_row<double>(a, row));
  for (int64_t i = 0; i < a.count; ++i) {
    double sum = 0.0;
    for (int64_t row = a.offsets[i]; row < a.offsets[i + 1]; ++row) sum += a.token_loss[row];
    a.response_loss[i] = mean(sum, a.lengths[i]);
  }
  store(a, summary);
}

}  // namespace dcpo
