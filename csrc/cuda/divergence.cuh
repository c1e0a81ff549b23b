// Divergences over more than the sampled token.
#pragma once

#include "cuda/block.cuh"

namespace dcpo {

// One of the tokens of a top-K divergence or a centre, in the thread of its place in the list; the
// sampled token, where it is not listed, in the one after them.
struct Listed {
  bool counted = false;  // in a centre the sampled token is not
  int64_t id = -1;
  Logit logit{-INFINITY, 1.0f};
  float old_logprob = -INFINITY;
  Masses masses{};  // of all of them
};

// The divergence over the K listed tokens, the sampled one (where it is not among them) and one
// bucket for the rest, or the centre. NaN for an id outside the vocabulary.
template <class T, class Cap>
__device__ float topk_divergence(const FusedArgs& a, int64_t row, const T* x, const Sums& sums,
                                 const RowInputs& in, Logit target_logit, BlockTotals& block,
                                 Listed& mine, const Cap& cap) {
  const int thread = threadIdx.x, k = static_cast<int>(a.k);
  bool sampled = false, outside = false;
  if (thread < k) {
    const int64_t id = a.topk_ids[row * a.k + thread];
    sampled = id == in.target;
    outside = !in_vocabulary(id, a.vocab);
    mine = {!outside, id, cap.of(outside ? NAN : widen(x[id])),
            a.topk_logprobs[row * a.k + thread]};
  }
  const bool listed = block.total(sampled ? 1.0f : 0.0f) > 0.0f;
  if (thread == k && !listed) {
    const float logp = logprob_of(sums, target_logit.value, temperature_of(a, row));
    mine = {!a.objective.score_centering, in.target, target_logit, old_logprob_of(a, in, logp)};
  }
  const float logp = logprob_of(sums, mine.logit.value, temperature_of(a, row));
  mine.masses.p = block.total(mine.counted ? expf(logp) : 0.0f);
  mine.masses.q = block.total(mine.counted ? expf(mine.old_logprob) : 0.0f);
  float term = outside ? NAN : 0.0f;
  if (mine.counted)
    term = topk_term(a.objective, in.advantage, logp, mine.old_logprob, mine.masses);
  return finish_topk(a.objective, block.total(term), mine.masses);
}

// write_row, and c.divergence_coef times the gradient of the divergence (topk_slope), where that is
// not 0 for the whole block.
template <class T, class Cap>
__device__ void write_row_with_topk(const FusedArgs& a, const T* x, T* dx, const RowInputs& in,
                                    const RowGradient& c, BlockTotals& block, const Listed& mine,
                                    const Cap& cap) {
  const bool pulls = c.divergence_coef != 0.0f;
  RowGradient others = c;
  float slope = 0.0f, p = 0.0f, total = 0.0f;
  if (pulls) {
    const float logp = logprob_of(c, mine.logit.value);
    p = expf(logp);
    if (mine.counted)
      slope = topk_slope(a.objective, in.advantage, logp, mine.old_logprob, mine.masses);
    total = block.total(slope);
    others = row_gradient_of<true>(c.g + c.divergence_coef * total, c.h, c.row_max, c.log_sum,
                                   c.entropy, c.temperature);
  }
  write_row<true>(x, dx, a.vocab, in.target, others, 0, Span<T>(x, a.vocab).packs, true, cap);
  if (!pulls) return;
  __syncthreads();
  if (in_vocabulary(mine.id, a.vocab))
    narrow(gradient_at<true>(c, mine.logit, mine.id == in.target) +
               c.divergence_coef * (slope - p * total) * mine.logit.slope / c.temperature,
           dx[mine.id]);
}

// The row of old logits, of a dtype known at run time.
struct OldRow {
  const void* data = nullptr;
  DType dtype = kFloat32;
  Sums sums;
  float drift = 0.0f;  // sum sign(p - q) p, which the gradient of TV wants

  __device__ float operator[](int64_t j) const {
    if (dtype == kFloat32) return static_cast<const float*>(data)[j];
    const uint16_t bits = static_cast<const uint16_t*>(data)[j];
    return dtype == kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
  }
};

__device__ __forceinline__ OldRow old_row_of(const FusedArgs& a, int64_t row) {
  OldRow old;
  if (!a.old_logits.data) return old;
  old.dtype = a.old_dtype;
  old.data = old.dtype == kFloat32
                 ? static_cast<const void*>(row_of<const float>(a.old_logits, row))
                 : row_of<const uint16_t>(a.old_logits, row);
  return old;
}

// A row of new logits beside one of old ones: what makes probabilities of both.
struct Pair {
  float scale, p_max, p_offset, q_max, q_offset;

  __device__ Pair(const Sums& sums, const Sums& old, float scale_)
      : scale(scale_),
        p_max(sums.row_max),
        p_offset(log_sum_of(sums) * kLog2E),
        q_max(old.row_max),
        q_offset(log_sum_of(old) * kLog2E) {}
  __device__ float p(float x) const { return exp2_approx((x - p_max) * scale - p_offset); }
  __device__ float q(float x) const { return exp2_approx((x - q_max) * scale - q_offset); }
};

// One more old logit. Before the first that was not masked the sum may be infinite: see merged().
__device__ __forceinline__ float absorb_old(Running& s, float w, float scale) {
  if (w > s.row_max) {
    if ((w - s.row_max) * scale >= 127.0f) s.sum_exp_z = 0.0f;
    rescale<true>(s, w, scale);
  }
  return s.y.of(w);
}

// KL(q || p) while the row of old logits is read: the mean of log q - log p under q. Or TV, once
// both rows were read.
template <class T, class Cap>
__device__ float full_divergence(const FusedArgs& a, const T* x, const Sums& sums, float scale,
                                 OldRow& old, BlockTotals& block, const Cap& cap) {
  if (Cap::kCaps || a.objective.divergence == kFullKl || old.dtype != a.dtype) {
    Running s;  // sum_exp_z: of 2^y (y - (x - max x) log2(e) / T)
    for (int64_t j = threadIdx.x; j < a.vocab; j += blockDim.x) {
      const float y = absorb_old(s, cap.of(old[j]).value, scale), e = exp2_approx(y);
      s.sum_exp += e;
      if (e != 0.0f)
        s.sum_exp_z += e * (y - (cap.of(widen(x[j])).value - sums.row_max) * scale);  // or 0 inf
    }
    old.sums = block.total<true>(s.sums(), scale);
  } else {
    const T* row = static_cast<const T*>(old.data);
    old.sums = block.total<false>(read_row<false, true>(row, a.vocab, scale, cap), scale);
  }
  if (a.objective.divergence == kFullKl)
    return mean_of(old.sums) - log_sum_of(old.sums) + log_sum_of(sums);
  const Pair pair(sums, old.sums, scale);
  float total = 0.0f, drift = 0.0f;
  for (int64_t j = threadIdx.x; j < a.vocab; j += blockDim.x) {
    const float p = pair.p(cap.of(widen(x[j])).value), q = pair.q(cap.of(old[j]).value);
    total += fabsf(p - q);
    drift += p * sign(p - q);
  }
  old.drift = block.total(drift);
  return 0.5f * block.total(total);
}

// write_row, and c.divergence_coef times the gradient of the divergence: p - q of KL, p (sign(p -
// q)
// - drift) / 2 of TV, over T.
template <class T, class Cap>
__device__ void write_row_with_full(const FusedArgs& a, const T* x, T* dx, int64_t target,
                                    const RowGradient& c, const Sums& sums, const OldRow& old,
                                    const Cap& cap) {
  const bool tv = a.objective.divergence == kFullTv;
  const float coef = c.divergence_coef / c.temperature;
  const Pair pair(sums, old.sums, c.scale);
  const Slope slope = slope_of<true>(c);
  for (int64_t j = threadIdx.x; j < a.vocab; j += blockDim.x) {
    const Logit logit = cap.of(widen(x[j]));
    const float p = pair.p(logit.value), q = pair.q(cap.of(old[j]).value);
    const float own =
        j == target ? gradient_at<true>(c, logit, true) : gradient_of<true>(slope, logit);
    const float slope_of_divergence = tv ? 0.5f * p * (sign(p - q) - old.drift) : p - q;
    narrow(own + coef * slope_of_divergence * logit.slope, dx[j]);
  }
}

}  // namespace dcpo
