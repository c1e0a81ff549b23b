// What the row kernels share: the softmax sums of a part of a row and how parts are put together,
// what a row is decided on, and the gradient of an element. csrc/cpu/rows.inc says the same for a
// CPU; the two agree on NaN, on infinities and on rows that don't count.
#pragma once

#include "cpu/rows.h"
#include "cuda/numbers.cuh"

namespace dcpo {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t row_offset(const View& view, int64_t row) {
  return row / view.per_batch * view.batch_stride + row % view.per_batch * view.row_stride;
}
template <class T>
__device__ __forceinline__ T* row_of(const View& view, int64_t row) {
  return static_cast<T*>(view.data) + row_offset(view, row);
}

// A row 16 bytes at a time: the elements before the first 16-byte boundary, the 16-byte packs, the
// elements after them.
template <class T>
struct Span {
  int64_t head, packs, size;

  __device__ Span(const T* x, int64_t vocab) : size(vocab) {
    const int64_t ahead =
        static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
    head = ahead < vocab ? ahead : vocab;
    packs = (vocab - head) / kPack<T>;
  }
  // The elements outside the packs, fewer than 2 kPack: where the i-th lies; -1: no such.
  __device__ int64_t edge(int i) const {
    const int64_t j = i < head ? i : i + packs * kPack<T>;
    return j < size ? j : -1;
  }
};

// ---- read ---------------------------------------------------------------------------------------

// Of some of a row's logits: y = (x - max) log2(e) / T; rest = sum 2^y without the 1 of a maximum;
// entropy_sum = sum 2^y y. The 1 is left out because a float32 near it has no digits below 6e-8:
// what stands beside a peak is all that log p, the entropy and the peak's 1 - p are made of. A NaN
// or +inf logit makes the rest NaN; nothing read yet is (-inf, -1, 0).
struct Sums {
  float max = -INFINITY;
  float rest = -1.0f;
  float entropy_sum = 0.0f;
};

// The sums of a thread while it reads, the maximum's 1 with them.
struct Running {
  float max = -INFINITY;
  float sum = 0.0f;
  float entropy_sum = 0.0f;

  __device__ __forceinline__ Sums sums() const { return {max, sum - 1.0f, entropy_sum}; }
};

// Makes the sums relative to a maximum that is at least theirs. (fmaxf returns its other operand
// for a NaN. Of an empty part the shift is -inf, held at -127: 2^-127 is 0 here, and 0 * -inf is
// not.)
template <bool kEntropy>
__device__ __forceinline__ void rescale(Running& s, float max, float scale) {
  const float base = max == -INFINITY ? 0.0f : max;
  const float shift = fmaxf((s.max - base) * scale, -127.0f), factor = exp2_approx(shift);
  if (kEntropy) s.entropy_sum = factor * (s.entropy_sum + s.sum * shift);
  s.sum *= factor;
  s.max = max;
}

// Adds n logits: one maximum for all of them, then their exponentials (online softmax, arXiv
// 1805.02867, a block at a time).
template <bool kEntropy, int n>
__device__ __forceinline__ void absorb(Running& s, const float (&x)[n], float scale) {
  float max = s.max;
#pragma unroll
  for (int i = 0; i < n; ++i) max = fmaxf(max, x[i]);
  rescale<kEntropy>(s, max, scale);
  // A row that begins with -inf has no maximum yet: 0 serves.
  const float base = max == -INFINITY ? 0.0f : max;
  constexpr int kChains = n < 4 ? n : 4;  // short chains of dependent additions
  float sum[kChains] = {}, entropy_sum[kChains] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float y = (x[i] - base) * scale;
    const float e = exp2_approx(y);
    sum[i % kChains] += e;
    if (kEntropy) entropy_sum[i % kChains] += e * fmaxf(y, -127.0f);  // 0 * -inf is NaN
  }
#pragma unroll
  for (int i = 1; i < kChains; ++i) {
    sum[0] += sum[i];
    entropy_sum[0] += entropy_sum[i];
  }
  s.sum += sum[0];
  if (kEntropy) s.entropy_sum += entropy_sum[0];
}

// Two parts of a row in one, relative to the higher maximum. A part far below it counts for
// nothing, and may hold anything: in full_kl an infinite sum, of masked logits alone.
template <bool kEntropy>
__device__ __forceinline__ Sums merged(const Sums& a, const Sums& b, float scale) {
  const float max = fmaxf(a.max, b.max), min = fminf(a.max, b.max);
  const bool first = a.max == max;
  const float base = max == -INFINITY ? 0.0f : max;
  const float shift = fmaxf((min - base) * scale, -127.0f), factor = exp2_approx(shift);
  const float low_sum = 1.0f + (first ? b.rest : a.rest);
  Sums all{max, (first ? a.rest : b.rest) + factor * low_sum, 0.0f};
  if (kEntropy) {
    const float low = (first ? b.entropy_sum : a.entropy_sum) + low_sum * shift;
    all.entropy_sum =
        (first ? a.entropy_sum : b.entropy_sum) + (factor == 0.0f ? 0.0f : factor * low);
  }
  return all;
}

__device__ __forceinline__ Sums from_lane(Sums s, int lane) {
  return {__shfl_sync(kAllLanes, s.max, lane), __shfl_sync(kAllLanes, s.rest, lane),
          __shfl_sync(kAllLanes, s.entropy_sum, lane)};
}

// Over a warp. All lanes return lane 0's result: two lanes that add up the same parts may round
// them differently, and lanes that differ in a bit could decide differently.
template <bool kEntropy>
__device__ __forceinline__ Sums warp_total(Sums s, float scale) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Sums other{__shfl_xor_sync(kAllLanes, s.max, step),
                     __shfl_xor_sync(kAllLanes, s.rest, step),
                     kEntropy ? __shfl_xor_sync(kAllLanes, s.entropy_sum, step) : 0.0f};
    s = merged<kEntropy>(s, other, scale);
  }
  return from_lane(s, 0);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float log_sum_of(const Sums& s) { return log1pf(s.rest); }
__device__ __forceinline__ float entropy_of(const Sums& s) {
  return log_sum_of(s) - s.entropy_sum * kLn2 / (1.0f + s.rest);
}
// The maximum apart from the rest: a row shifted by 1e4 loses nothing.
__device__ __forceinline__ float logprob_of(const Sums& s, float x, float temperature) {
  return (x - s.max) / temperature - log_sum_of(s);
}

// ---- decide -------------------------------------------------------------------------------------

__device__ __forceinline__ bool in_vocabulary(int64_t id, int64_t vocab) {
  return id >= 0 && id < vocab;
}

// A row that is not read: results 0, ratio 1, gradient 0.
__device__ __forceinline__ bool idle(const FusedArgs& a, int64_t row) {
  if (a.weights[row] == 0.0f) return true;
  return a.skip_zero_advantage && a.advantages[row] == 0.0f &&
         !pulls_without_advantage(a.objective);
}

__device__ __forceinline__ void write_idle(const FusedArgs& a, int64_t row) {
  a.token_loss[row] = a.logprobs[row] = 0.0f;
  if (a.entropy) a.entropy[row] = 0.0f;
  a.ratio[row] = 1.0f;
  a.clipped[row] = kClippedNone;
}

// The scalars of a row that is read, loaded ahead of their use.
struct RowInputs {
  int64_t target;
  float weight, old_logprob, advantage, importance, ref_logprob;
};

__device__ __forceinline__ RowInputs load_inputs(const FusedArgs& a, int64_t row) {
  return {a.target_ids[row],
          a.weights[row],
          a.old_logprobs[row],
          a.advantages[row],
          a.importance_weights ? a.importance_weights[row] : 1.0f,
          a.ref_logprobs ? a.ref_logprobs[row] : 0.0f};
}

// What is left of a row once it is decided: dx_j = 2^y_j (b + a y_j) with
// y = log2 p = (x - max) scale - offset, and the terms of the target's own gradient.
struct RowGradient {
  float max, scale, offset, a, b;
  float g, h, log_sum, entropy, temperature;
  float pull;  // dloss/ddivergence of a penalty, weighted; not part of a, b and g
  bool zero;   // nothing pulls at this row: zeros, whatever its logits are
};

template <bool kEntropy>
__device__ __forceinline__ RowGradient row_gradient_of(float g, float h, float max, float log_sum,
                                                       float entropy, float temperature) {
  RowGradient c;
  c.max = max;
  c.scale = kLog2E / temperature;
  c.offset = log_sum * kLog2E;
  c.a = kEntropy ? -h * kLn2 / temperature : 0.0f;
  c.b = -(g + (kEntropy ? h * entropy : 0.0f)) / temperature;
  c.g = g;
  c.h = kEntropy ? h : 0.0f;
  c.log_sum = log_sum;
  c.entropy = entropy;
  c.temperature = temperature;
  c.pull = 0.0f;
  c.zero = g == 0.0f && h == 0.0f;
  return c;
}

// Decides a row and, in one thread, writes its results. An id outside the vocabulary: the target
// logit is NaN, and with it the loss and the gradient.
template <bool kEntropy>
__device__ __forceinline__ RowGradient decide_row(const FusedArgs& a, int64_t row,
                                                  const RowInputs& in, const Sums& s,
                                                  float target_logit, float divergence,
                                                  bool writes) {
  const float temperature = a.shape.temperature;
  if (!in_vocabulary(in.target, a.shape.vocab)) target_logit = NAN;
  Token t;
  t.logprob = logprob_of(s, target_logit, temperature);
  t.old_logprob = in.old_logprob;
  t.advantage = in.advantage;
  t.log_ratio = t.logprob - t.old_logprob;
  t.importance = in.importance;
  t.ref_logprob = in.ref_logprob;
  t.entropy = kEntropy ? entropy_of(s) : 0.0f;
  t.divergence = divergence;
  const Decision d = decide(a.objective, t);
  if (writes) {
    a.token_loss[row] = d.loss;
    a.logprobs[row] = t.logprob;
    if (kEntropy && a.entropy) a.entropy[row] = t.entropy;
    a.ratio[row] = d.ratio;
    a.clipped[row] = d.clipped;
  }
  RowGradient c = row_gradient_of<kEntropy>(in.weight * d.g, in.weight * d.h, s.max, log_sum_of(s),
                                            t.entropy, temperature);
  c.pull = in.weight * d.pull;
  return c;
}

// ---- write --------------------------------------------------------------------------------------

template <bool kEntropy>
__device__ __forceinline__ float gradient_of(const RowGradient& c, float x) {
  const float y = (x - c.max) * c.scale - c.offset;
  if (!kEntropy) return exp2_approx(y) * c.b;
  return exp2_approx(y) * (c.b + c.a * fmaxf(y, -127.0f));
}

// Of one logit. 1 - p from expm1: nothing is left of it in float32 where p is near 1. Where p is 0,
// so is p log p.
template <bool kEntropy>
__device__ __forceinline__ float gradient_at(const RowGradient& c, float x, bool is_target) {
  const float logp = (x - c.max) / c.temperature - c.log_sum;
  float value = c.g * (is_target ? -expm1f(logp) : -expf(logp));
  if (kEntropy) {
    const float p = expf(logp);
    value -= c.h * (p > 0.0f || !(logp == logp) ? p * (logp + c.entropy) : 0.0f);
  }
  return value / c.temperature;
}

// Of 16 bytes of logits.
template <bool kEntropy, class T>
__device__ __forceinline__ uint4 gradient_of(const RowGradient& c, uint4 bits) {
  float x[kPack<T>];
  widen<T>(bits, x);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = gradient_of<kEntropy>(c, x[i]);
  return narrow<T>(x);
}

}  // namespace dcpo
