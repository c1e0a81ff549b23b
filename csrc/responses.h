// The operators around the vocabulary kernel, which take some bytes per row and response: what they
// are given, and what they say of one response or row. dcpo_kernels/backends/reference.py is the
// same in PyTorch.
#pragma once

#include <cmath>
#include <cstdint>

#include "decide.h"

namespace dcpo {

// ---- what they are given ------------------------------------------------------------------------
// Named as the records of dcpo_kernels/ops/. A null pointer is a tensor that is not there. `rows`
// is the number of rows, one per token, `count` that of responses.

enum Aggregation : int {  // places in objective.AGGREGATIONS
  kOnlyTokenMean,
  kSeqMeanTokenMean,
  kTokenMean,
  kTokenSum,
  kSeqMeanTokenSumNorm,
  kSeqMeanTokenSum
};
constexpr const char* kAggregations[] = {
    "only-token-mean", "seq-mean-token-mean",     "token-mean",
    "token-sum",       "seq-mean-token-sum-norm", "seq-mean-token-sum"};

constexpr int64_t kAsCounted = INT64_MIN;  // a total that nobody gave
constexpr int kMaxValues = 4;              // advantages, importance weights, temperatures, one more

struct Grouping {
  const uint8_t* mask;
  const int64_t* lengths;
  int aggregation;
  int64_t num_responses, num_tokens, max_length;
  const float *num_responses_on_device, *num_tokens_on_device, *max_length_on_device;
  const float* skip_zero;
  bool skip_by_response, skip_whole_responses;
  const int64_t* response_lengths;  // tokens of the whole response; null: all of them are here
  const float* weights;             // [rows], in the place of the aggregation's
};

struct Responses {
  float* weights;
  uint8_t* mask;
  int64_t *offsets, *lengths;
};

struct TokenWeightsArgs {
  int64_t rows, count;
  Grouping grouping;
  Responses responses;
  int num_values;
  const float* values[kMaxValues];  // [count] each
  float* spread[kMaxValues];        // [rows] each
};

struct DecideArgs {
  int64_t rows, count;
  const float *logprobs, *entropy;
  const float *old_logprobs, *advantages, *weights, *ref_logprobs, *importance_weights;
  const float *log_ratio, *rollout_logprobs, *entropy_weights;  // as in FusedArgs
  Objective objective;
  bool by_response, spread;
  const int64_t *offsets, *lengths;
  float *token_loss, *ratio;
  int8_t* clipped;
  float *g, *h;  // h: null where there is no entropy term
};

struct FinishArgs {
  int64_t rows, count;
  const float *token_loss, *logprobs, *entropy, *ratio;  // entropy: null where nobody asked for it
  const int8_t* clipped;
  const float* weights;
  const uint8_t* mask;
  const int64_t *offsets, *lengths;
  float *loss, *response_loss, *summary;
};

// ---- token_weights ------------------------------------------------------------------------------

// Of the responses in a call.
struct Counts {
  int64_t responses, tokens, longest;  // responses: with at least one token
};

DCPO_HD void add(Counts& c, int64_t length) {
  c.responses += length > 0;
  c.tokens += length;
  c.longest = length > c.longest ? length : c.longest;
}

// Where a response ends, from the sum of the lengths so far: never outside the rows.
DCPO_HD int64_t within(int64_t sum, int64_t rows) { return sum < 0 ? 0 : sum > rows ? rows : sum; }
// Unchecked lengths may overflow 64 bits; then the sum wraps, which is defined for unsigned only.
DCPO_HD int64_t wrapping_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

// Rows of a response, as given.
DCPO_HD int64_t length_of(const TokenWeightsArgs& a, int64_t response) {
  return a.grouping.lengths ? a.grouping.lengths[response] : a.rows / a.count;
}

DCPO_HD bool counts(const Grouping& g, int64_t row) { return !g.mask || g.mask[row] != 0; }

// Whether skip_zero leaves a row to be read. With skip_whole_responses a response is read whole if
// one of its rows that count is.
DCPO_HD bool live(const Grouping& g, int64_t response, int64_t row) {
  return !g.skip_zero || g.skip_zero[g.skip_by_response ? response : row] != 0.0f;
}

// A total of the whole batch; NaN if it is not > 0 or smaller than what is counted in this call.
DCPO_HD float total(int64_t given, const float* on_device, int64_t counted) {
  const float here = static_cast<float>(counted);
  if (!on_device && given == kAsCounted) return here;
  const float whole = on_device ? *on_device : static_cast<float>(given);
  return whole > 0.0f && whole >= here ? whole : NAN;
}

// Tokens of the whole response, of which `here` are in this call; -1 where that can't be.
DCPO_HD int64_t whole_length(const Grouping& g, int64_t response, int64_t here) {
  if (!g.response_lengths) return here;
  return g.response_lengths[response] >= here ? g.response_lengths[response] : -1;
}

// Of each token of a response of n tokens (dcpo_kernels/responses.py).
DCPO_HD float token_weight(const Grouping& g, const Counts& c, int64_t n) {
  if (n <= 0) return n == 0 ? 0.0f : NAN;
  const float length = static_cast<float>(n);
  const float responses = total(g.num_responses, g.num_responses_on_device, c.responses);
  switch (g.aggregation) {
    case kOnlyTokenMean:
      return 1.0f / length;
    case kSeqMeanTokenMean:
      return 1.0f / (responses * length);
    case kTokenMean:
      return 1.0f / total(g.num_tokens, g.num_tokens_on_device, c.tokens);
    case kTokenSum:
      return 1.0f;
    case kSeqMeanTokenSum:
      return 1.0f / responses;
    default:
      return 1.0f / (responses * total(g.max_length, g.max_length_on_device, c.longest));
  }
}

// whole: the response is read whole, whatever skip_zero says of the row; weight: the aggregation's.
DCPO_HD void write_token(const TokenWeightsArgs& a, int64_t response, int64_t row, bool whole,
                         float weight) {
  const bool counted = counts(a.grouping, row);
  const bool read = counted && (whole || live(a.grouping, response, row));
  if (a.grouping.weights) weight = a.grouping.weights[row];
  a.responses.weights[row] = read ? weight : 0.0f;
  a.responses.mask[row] = counted;
  for (int k = 0; k < a.num_values; ++k) a.spread[k][row] = a.values[k][response];
}

// A row after the last response: of weight 0, with that response's values.
DCPO_HD void write_rest(const TokenWeightsArgs& a, int64_t row) {
  a.responses.weights[row] = 0.0f;
  a.responses.mask[row] = 0;
  for (int k = 0; k < a.num_values; ++k)
    a.spread[k][row] = a.count ? a.values[k][a.count - 1] : 0.0f;
}

// ---- decide -------------------------------------------------------------------------------------

DCPO_HD float old_logprob_of(const DecideArgs& a, int64_t row) {
  return a.old_logprobs ? a.old_logprobs[row] : a.logprobs[row];
}

DCPO_HD Token token_of(const DecideArgs& a, int64_t row) {
  Token t;
  t.logprob = a.logprobs[row];
  t.old_logprob = old_logprob_of(a, row);
  t.advantage = a.advantages[row];
  t.importance = a.importance_weights ? a.importance_weights[row] : 1.0f;
  if (a.rollout_logprobs)
    t.importance *= rollout_weight(a.objective, t.old_logprob - a.rollout_logprobs[row]);
  t.ref_logprob = a.ref_logprobs ? a.ref_logprobs[row] : 0.0f;
  t.entropy = a.entropy ? a.entropy[row] : 0.0f;
  t.divergence = 0.0f;  // a binary one follows from the token
  t.log_ratio = a.log_ratio ? a.log_ratio[row] : t.logprob - t.old_logprob;
  return t;
}

// What a row adds to its response's log-ratio: nothing where its weight is 0.
DCPO_HD float log_ratio_of(const DecideArgs& a, int64_t row) {
  return a.weights[row] == 0.0f ? 0.0f : log_ratio_part(a.objective, token_of(a, row));
}

// A response has the rows [begin, end), and its ratio serves [begin, last): rows after the last
// response take that one's ratio, and without any response all rows take that of an empty one.
struct ResponseRows {
  int64_t begin, end, last, length;
};
DCPO_HD ResponseRows rows_of(const DecideArgs& a, int64_t i) {
  if (a.count == 0) return {0, 0, a.rows, 0};
  const int64_t end = a.offsets[i + 1];
  return {a.offsets[i], end, i + 1 < a.count ? end : a.rows, a.lengths[i]};
}

// Whether a token has a share in the gradient of its response's ratio.
DCPO_HD bool shares(const DecideArgs& a, int8_t clipped) {
  return a.objective.surrogate != kGeometricClip || clipped == kClippedNone;
}

// log_ratio: the response's; null: the row has its own. What it returns pulls at the response's
// ratio, with `spread` instead of at the row itself.
DCPO_HD float decide_row(const DecideArgs& a, int64_t row, const float* log_ratio) {
  const float weight = a.weights[row];
  Decision d{0.0f, 0.0f, 0.0f, 1.0f, kClippedNone, 0.0f, 0.0f};
  if (weight != 0.0f) {
    Token t = token_of(a, row);
    if (log_ratio) t.log_ratio = *log_ratio;
    const float entropy_weight = a.entropy_weights ? a.entropy_weights[row] : 1.0f;
    t.entropy *= entropy_weight;
    d = decide(a.objective, t);
    if (a.spread && shares(a, d.clipped)) d.g -= d.through_ratio;
    d.g *= weight;
    d.h *= weight * entropy_weight;
  }
  a.token_loss[row] = d.loss;
  a.ratio[row] = d.ratio;
  a.clipped[row] = d.clipped;
  a.g[row] = d.g;
  if (a.h) a.h[row] = d.h;
  return weight * d.through_ratio;
}

// A row's share of what pulls at its response's ratio, of which `mean` is the mean over its tokens.
DCPO_HD void spread_to(const DecideArgs& a, int64_t row, float mean) {
  if (a.weights[row] != 0.0f && shares(a, a.clipped[row])) a.g[row] += mean;
}

// ---- finish -------------------------------------------------------------------------------------

enum SummaryField : int {  // as ops/records.py has them
  kLoss,
  kTokens,
  kTokensRead,
  kLogprobSum,
  kEntropySum,
  kRatioSum,
  kRatioMin,
  kRatioMax,
  kKlSum,
  kClipHigh,
  kClipLow,
  kClipCap,
  kClipRegion,
  kTokensDropped,  // 0 here: who asked for it knows it
  kSummaryFields
};

// The summary of a part of the rows. Real: what sums are kept in; counts too, a float holds them
// exactly up to 2^24.
template <class Real>
struct Summary {
  Real at[kSummaryFields];
};

template <class Real>
DCPO_HD Summary<Real> nothing_read() {
  Summary<Real> s{};
  s.at[kRatioMin] = INFINITY;
  s.at[kRatioMax] = -INFINITY;
  return s;
}

template <class Real>
DCPO_HD Summary<Real> of_row(const FinishArgs& a, int64_t row) {
  Summary<Real> s = nothing_read<Real>();
  const Real weight = a.weights[row], r = a.ratio[row];
  s.at[kTokens] = a.mask[row] != 0;
  if (weight == Real(0)) return s;
  s.at[kLoss] = weight * a.token_loss[row];
  s.at[kLogprobSum] = a.logprobs[row];
  if (a.entropy) s.at[kEntropySum] = a.entropy[row];
  s.at[kTokensRead] = 1;
  s.at[kRatioSum] = s.at[kRatioMin] = s.at[kRatioMax] = r;
  s.at[kKlSum] = (r - 1) - std::log(r);
  const int clipped = a.clipped[row];
  for (int side = kClippedHigh; side <= kClippedRegion; ++side)
    s.at[kClipHigh + side - kClippedHigh] = clipped == side ? 1 : 0;
  return s;
}

// Smaller and larger of two; NaN where one is.
template <class Real>
DCPO_HD Real lower(Real a, Real b) {
  return a < b || a != a ? a : b;
}
template <class Real>
DCPO_HD Real higher(Real a, Real b) {
  return a > b || a != a ? a : b;
}

template <class Real>
DCPO_HD void add(Summary<Real>& s, const Summary<Real>& other) {
  for (int i = 0; i < kSummaryFields; ++i) {
    const Real x = s.at[i], y = other.at[i];
    s.at[i] = i == kRatioMin ? lower(x, y) : i == kRatioMax ? higher(x, y) : x + y;
  }
}

template <class Real>
DCPO_HD void store(const FinishArgs& a, Summary<Real> s) {
  if (s.at[kTokensRead] == 0) s.at[kRatioMin] = s.at[kRatioMax] = 1;
  for (int i = 0; i < kSummaryFields; ++i) a.summary[i] = static_cast<float>(s.at[i]);
  *a.loss = a.summary[kLoss];
}

// Of the sum over its rows; 0 for a response without tokens, whose rows hold 0.
template <class Real>
DCPO_HD float mean(Real sum, int64_t length) {
  return static_cast<float>(sum / static_cast<Real>(length > 0 ? length : 1));
}

// Of a response, from the sum over its rows: the mean, or the sum itself.
template <class Real>
DCPO_HD float response_log_ratio(const Objective& o, Real sum, int64_t length) {
  return o.surrogate == kGamma ? static_cast<float>(sum) : mean(sum, length);
}

// ---- where they run -----------------------------------------------------------------------------

void cpu_token_weights(const TokenWeightsArgs& args);
void cpu_decide(const DecideArgs& args);
void cpu_finish(const FinishArgs& args);

// On a stream (a cudaStream_t) of a device, with every pointer to its memory. Throw
// std::runtime_error with CUDA's message.
void cuda_token_weights(const TokenWeightsArgs& args, int device, uintptr_t stream);
void cuda_decide(const DecideArgs& args, int device, uintptr_t stream);
void cuda_finish(const FinishArgs& args, int device, uintptr_t stream);

}  // namespace dcpo
