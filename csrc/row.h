// A row after the read: its sums, the inputs of its decision, the coefficients of its gradient.
// Shared by the CPU and the CUDA kernels, which agree on NaN, on infinities and on rows that don't
// count.
#pragma once

#include "args.h"

namespace dcpo {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// ---- numbers ------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline int64_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// f(T()) with the type of a dtype.
template <class F>
static inline auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case kBFloat16:
      return f(BFloat16());
    case kFloat16:
      return f(Float16());
    default:
      return f(float());
  }
}

template <class F>
static inline void each_dtype(F&& f) {
  for (const DType dtype : {kBFloat16, kFloat16, kFloat32}) with_dtype(dtype, f);
}

template <class T>
DCPO_HD T* row_of(const View& view, int64_t row) {
  // A division takes a GPU some sixty instructions.
  const int64_t batch = row < view.per_batch ? 0 : row / view.per_batch;
  return static_cast<T*>(view.data) + batch * view.batch_stride +
         (row - batch * view.per_batch) * view.row_stride;
}

// Temperatures per row are checked on a CPU only. One that is not > 0 makes its row NaN.
DCPO_HD float temperature_of(const Batch& a, int64_t row) {
  const float t = a.temperatures ? a.temperatures[row] : a.temperature;
  return t > 0.0f ? t : NAN;
}

DCPO_HD bool in_vocabulary(int64_t id, int64_t vocab) { return id >= 0 && id < vocab; }

// ---- softcap ------------------------------------------------------------------------------------

// A logit as the loss takes it: x~ = softcap tanh(x / softcap) (arXiv 2408.00118), and dx~/dx.
// Without a softcap x itself, and 1. -inf stays what it is, a probability of 0; +inf becomes NaN.
//
// With E = e^(-2 |x| / softcap): tanh |x / softcap| = (1 - E) / (1 + E), and dx~/dx = 4 E / (1 +
// E)^2. E = 2^n (1 + f P(f)), so E - 1 has all its digits beside E = 1 and E beside E = 0: what is
// small stays itself, and what is saturated keeps its gradient.
struct Logit {
  float value, slope;
};

// f P(f): 2^f - 1 on half a unit to either side, relative error of P 1.7e-8. F: float or a vector.
template <class F>
DCPO_HD F exp2_minus_1(F f) {
  F p = f * 0x1.42ed84p-13f + 0x1.5ef3c8p-10f;
  p = p * f + 0x1.3b2bb6p-7f;
  p = p * f + 0x1.c6afap-5f;
  p = p * f + 0x1.ebfbdep-3f;
  p = p * f + 0x1.62e43p-1f;
  return p * f;
}

// ---- read ---------------------------------------------------------------------------------------

// Sums over a row or a part of it. With y = (x - max) log2(e) / T: sum_exp = sum 2^y, sum_exp_z =
// sum 2^y y (for a KL, y minus the other row's y). `rest` is sum_exp without the 1 of the maximum:
// a float32 near 1 has no digits below 6e-8, and beside a dominant token log p, 1 - p and the
// entropy depend on just those digits. A NaN or +inf logit makes it NaN. Before any logit the
// fields are (-inf, -1, 0).
struct Sums {
  float row_max = -INFINITY;
  float rest = -1.0f;
  float sum_exp_z = 0.0f;
};

DCPO_HD float log_sum_of(const Sums& s) { return log1pf(s.rest); }
DCPO_HD float mean_of(const Sums& s) { return s.sum_exp_z * kLn2 / (1.0f + s.rest); }
DCPO_HD float entropy_of(const Sums& s) { return log_sum_of(s) - mean_of(s); }
// The maximum is subtracted first: a row shifted by 1e4 loses no digits.
DCPO_HD float logprob_of(const Sums& s, float x, float temperature) {
  return (x - s.row_max) / temperature - log_sum_of(s);
}

// ---- decide -------------------------------------------------------------------------------------

// A row that is not read: results 0, ratio 1, gradient 0.
DCPO_HD bool idle(const FusedArgs& a, int64_t row) { return a.weights[row] == 0.0f; }

DCPO_HD void write_idle(const FusedArgs& a, int64_t row) {
  a.token_loss[row] = a.logprobs[row] = 0.0f;
  if (a.entropy) a.entropy[row] = 0.0f;
  a.ratio[row] = 1.0f;
  a.clipped[row] = kClippedNone;
  a.has_gradient[row] = 0;
}

// The scalars of a row that is read, loaded ahead of their use.
struct RowInputs {
  int64_t target;
  float weight, old_logprob, advantage, importance, ref_logprob;
};

DCPO_HD RowInputs load_inputs(const FusedArgs& a, int64_t row) {
  return {a.target_ids[row],
          a.weights[row],
          a.old_logprobs ? a.old_logprobs[row] : 0.0f,
          a.advantages[row],
          a.importance_weights ? a.importance_weights[row] : 1.0f,
          a.ref_logprobs ? a.ref_logprobs[row] : 0.0f};
}

DCPO_HD float old_logprob_of(const FusedArgs& a, const RowInputs& in, float logprob) {
  return a.old_logprobs ? in.old_logprob : logprob;
}

// The gradient of a row once it is decided: dx_j = 2^y (b + a y), y = log2 p_j = (x_j - max) scale
// - offset, and the terms of the target's own entry.
struct RowGradient {
  float row_max, scale, offset, a, b;
  float g, h, log_sum, entropy, temperature;
  float divergence_coef;  // times the token's weight; not part of a, b and g
  bool zero;              // the gradient is 0, whatever the logits are
};

template <bool kEntropy>
DCPO_HD RowGradient row_gradient_of(float g, float h, float row_max, float log_sum, float entropy,
                                    float temperature) {
  RowGradient c;
  // Canonicalize: on a CPU a NaN with bits set in its lower half alone would round to infinity.
  c.g = g == g ? g : NAN;
  c.h = !kEntropy ? 0.0f : h == h ? h : NAN;
  c.row_max = row_max;
  c.scale = kLog2E / temperature;
  c.offset = log_sum * kLog2E;
  c.a = kEntropy ? -c.h * kLn2 / temperature : 0.0f;
  c.b = -(c.g + (kEntropy ? c.h * entropy : 0.0f)) / temperature;
  c.log_sum = log_sum;
  c.entropy = entropy;
  c.temperature = temperature;
  c.divergence_coef = 0.0f;
  c.zero = g == 0.0f && h == 0.0f;
  return c;
}

// Decides a row and, where it `writes`, stores its results. An id outside the vocabulary: the
// target logit is NaN, and with it the loss and the gradient.
template <bool kEntropy>
DCPO_HD RowGradient decide_row(const FusedArgs& a, int64_t row, const RowInputs& in, const Sums& s,
                               float target_logit, float divergence, bool writes) {
  if (!in_vocabulary(in.target, a.vocab)) target_logit = NAN;
  const float temperature = temperature_of(a, row);  // not in RowInputs: saves a register
  Token t;
  t.logprob = logprob_of(s, target_logit, temperature);
  t.old_logprob = old_logprob_of(a, in, t.logprob);
  t.advantage = in.advantage;
  t.importance = in.importance;
  if (a.rollout_logprobs)
    t.importance *= rollout_weight(a.objective, t.old_logprob - a.rollout_logprobs[row]);
  t.ref_logprob = in.ref_logprob;
  const float entropy = kEntropy ? entropy_of(s) : 0.0f;
  const float entropy_weight = kEntropy && a.entropy_weights ? a.entropy_weights[row] : 1.0f;
  t.entropy = entropy_weight * entropy;
  t.divergence = divergence;
  t.log_ratio = a.log_ratio ? a.log_ratio[row] : t.logprob - t.old_logprob;
  const Decision d = decide(a.objective, t);
  RowGradient c = row_gradient_of<kEntropy>(in.weight * d.g, in.weight * entropy_weight * d.h,
                                            s.row_max, log_sum_of(s), entropy, temperature);
  c.divergence_coef = in.weight * d.divergence_coef;
  if (writes) {
    a.token_loss[row] = d.loss;
    a.logprobs[row] = t.logprob;
    if (kEntropy && a.entropy) a.entropy[row] = entropy;
    a.ratio[row] = d.ratio;
    a.clipped[row] = d.clipped;
    a.has_gradient[row] = !c.zero || c.divergence_coef != 0.0f;
  }
  return c;
}

// The same from coefficients that are given; g: the sum over the row's targets.
template <bool kEntropy>
DCPO_HD RowGradient row_gradient_of(const GradientArgs& a, int64_t row, float g) {
  const float factor = a.factor ? *a.factor : 1.0f;
  return row_gradient_of<kEntropy>(factor * g, a.h ? factor * a.h[row] : 0.0f, a.row_max[row],
                                   a.log_sum[row], a.entropy ? a.entropy[row] : 0.0f,
                                   temperature_of(a, row));
}

// ---- write --------------------------------------------------------------------------------------

DCPO_HD float logprob_of(const RowGradient& c, float x) {
  return (x - c.row_max) / c.temperature - c.log_sum;
}

// The gradient of one logit. 1 - p comes from expm1: as a difference it has no digits left where p
// is near 1. p log p is 0 where p is.
template <bool kEntropy>
DCPO_HD float gradient_at(const RowGradient& c, Logit x, bool is_target) {
  const float logp = logprob_of(c, x.value);
  float value = c.g * (is_target ? -expm1f(logp) : -expf(logp));
  if (kEntropy) {
    const float p = expf(logp);
    value -= c.h * (p > 0.0f || !(logp == logp) ? p * (logp + c.entropy) : 0.0f);
  }
  return value * x.slope / c.temperature;
}

// The gradient of the i-th of a row's k targets: its own g, with those of the same id, times 1 - p,
// minus p times all others.
DCPO_HD float gradient_at_target(const GradientArgs& a, int64_t row, int64_t i, RowGradient c,
                                 Logit x) {
  const int64_t* ids = a.target_ids + row * a.k;
  float own = 0.0f, others = 0.0f;
  for (int64_t j = 0; j < a.k; ++j) (ids[j] == ids[i] ? own : others) += a.g[row * a.k + j];
  const float factor = a.factor ? *a.factor : 1.0f;
  c.g = factor * own;
  return gradient_at<true>(c, x, true) -
         factor * others * expf(logprob_of(c, x.value)) * x.slope / c.temperature;
}

}  // namespace dcpo
