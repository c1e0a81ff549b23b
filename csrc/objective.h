// "Decide": what an objective says of one token, from its scalars alone.
//
// The C++ twin of dcpo_kernels/objectives.py (decide), included by the CPU and the CUDA kernels.
// float32 throughout.
#pragma once

#include <cmath>
#include <cstdint>

// static: each CPU kernel is compiled for another instruction set, and the linker must not let them
// share a copy.
#if defined(__CUDACC__)
#define DCPO_HD static __host__ __device__ __forceinline__
#else
#define DCPO_HD static inline
#endif

namespace dcpo {

// The codes are the positions of the names in objectives.py: SURROGATES, DIVERGENCES.
enum Surrogate : int {
  kClip,
  kDynamicClip,
  kInverseSqrtClip,
  kReinforce,
  kSoftGate,
  kRatioMask
};
enum Divergence : int { kNone, kBinaryTv, kBinaryKl, kTopkTv, kTopkKl, kFullTv, kFullKl };
enum Clipped : int8_t { kClippedNone, kClippedHigh, kClippedLow, kClippedCap, kClippedRegion };

constexpr float kMaxLogRatio =
    20.0f;  // |logp - old_logp| and |ref_logp - logp| are held here before exp
constexpr float kMinProb =
    1.17549435e-38f;        // smallest normal: q = 0 and denormal q must not give 0/0
constexpr int kMaxK = 128;  // tokens of a top-K divergence, objectives.py: MAX_K
// Floor of the probability of whatever is not listed in a divergence.
constexpr float kMinRest = 1e-12f;

struct Objective {
  int surrogate;
  int divergence;
  float eps_low, eps_high;  // soft gate: the temperatures for A < 0 and A > 0
  float ratio_max, ratio_cap;
  float limit_low, limit_high;
  float kl_coef, entropy_coef, penalty_coef;
};

struct Token {
  float logprob, old_logprob, advantage;
  float log_ratio;   // logprob - old_logprob, or the response's mean of it (GSPO)
  float importance;  // multiplies the policy term; 1 where there is none
  float ref_logprob;
  float entropy;
  float divergence;  // top-K and full divergences; binary ones are computed here
};

struct Decision {
  float loss;
  float g;  // dloss/dlogprob
  float h;  // dloss/dentropy
  float ratio;
  Clipped clipped;
  float pull;  // dloss/ddivergence of a penalty on a top-K or full one; a binary one's is in g
};

DCPO_HD bool needs_topk(const Objective& o) {
  return o.divergence == kTopkTv || o.divergence == kTopkKl;
}
DCPO_HD bool needs_old_logits(const Objective& o) {
  return o.divergence == kFullTv || o.divergence == kFullKl;
}
// Whether a token of advantage 0 may have a gradient.
DCPO_HD bool pulls_without_advantage(const Objective& o) {
  return o.kl_coef != 0.0f || o.entropy_coef != 0.0f || o.penalty_coef != 0.0f;
}

DCPO_HD float hold(float log_ratio) {
  // comparisons in this order let NaN through
  return log_ratio > kMaxLogRatio    ? kMaxLogRatio
         : log_ratio < -kMaxLogRatio ? -kMaxLogRatio
                                     : log_ratio;
}

DCPO_HD float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }

// Divergence between two policies told apart by the sampled token alone (DPPO section 4).
DCPO_HD float binary_divergence(int kind, float logp, float old_logp) {
  const float p = expf(logp), q = expf(old_logp);
  if (kind == kBinaryTv) return fabsf(p - q);
  // log(1 - p) from expm1: 1 - exp(logp) has no digits left where logp is near 0
  const float not_p = -expm1f(logp), not_q = -expm1f(old_logp);
  const float inside = q > 0.0f ? q * (old_logp - logp) : 0.0f;
  const float held = not_p < kMinRest ? kMinRest : not_p;
  return inside + (not_q > 0.0f ? not_q * (logf(not_q) - logf(held)) : 0.0f);
}

// Its derivative in logp.
DCPO_HD float binary_slope(int kind, float logp, float old_logp) {
  const float p = expf(logp), q = expf(old_logp);
  if (kind == kBinaryTv) return p * sign(p - q);
  const float not_p = -expm1f(logp), not_q = -expm1f(old_logp);
  return (not_p < kMinRest ? 0.0f : not_q * p / not_p) - q;
}

// One listed token of a top-K divergence; `finish_topk` adds the bucket of all others.
DCPO_HD float topk_term(int kind, float logp, float old_logp) {
  const float p = expf(logp), q = expf(old_logp);
  if (kind == kTopkTv) return fabsf(p - q);
  return q > 0.0f ? q * (old_logp - logp) : 0.0f;
}

DCPO_HD float finish_topk(int kind, float sum, float mass_p, float mass_q) {
  const float rest_p = 1.0f - mass_p > kMinRest ? 1.0f - mass_p : kMinRest;
  const float rest_q = 1.0f - mass_q > kMinRest ? 1.0f - mass_q : kMinRest;
  if (kind == kTopkTv) return 0.5f * (sum + fabsf(rest_p - rest_q));
  return sum + rest_q * (logf(rest_q) - logf(rest_p));
}

// The gradient of a top-K divergence in a listed logit is e - p sum(e), in any other -p sum(e),
// over T. Here: e = p (dD/dp - dD/drest_p).
DCPO_HD float topk_slope(int kind, float logp, float old_logp, float mass_p, float mass_q) {
  const float p = expf(logp), q = expf(old_logp);
  const float rest_p = 1.0f - mass_p;
  const float rest_q = 1.0f - mass_q > kMinRest ? 1.0f - mass_q : kMinRest;
  const bool held = rest_p < kMinRest;
  if (kind == kTopkTv) return 0.5f * p * (sign(p - q) - (held ? 0.0f : sign(rest_p - rest_q)));
  return (held ? 0.0f : p * rest_q / rest_p) - q;
}

DCPO_HD Decision decide(const Objective& o, const Token& t) {
  const float A = t.advantage;
  const float r = expf(hold(t.log_ratio));
  const bool held =
      fabsf(t.log_ratio) > kMaxLogRatio;  // there the ratio is a constant; false for NaN
  Decision d{0.0f, 0.0f, 0.0f, r, kClippedNone, 0.0f};
  const bool binary = o.divergence == kBinaryTv || o.divergence == kBinaryKl;
  const float divergence =
      binary ? binary_divergence(o.divergence, t.logprob, t.old_logprob) : t.divergence;

  if (o.surrogate == kSoftGate) {
    // SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1))
    const float tau = A > 0.0f ? o.eps_high : o.eps_low;
    const float gate = 1.0f / (1.0f + expf(-tau * (r - 1.0f)));
    d.loss = -A * 4.0f / tau * gate;
    d.g = -A * 4.0f * gate * (1.0f - gate) * r;
  } else if (o.surrogate == kReinforce) {
    float weight = r > o.ratio_cap ? o.ratio_cap : r;
    if (o.divergence == kNone || o.penalty_coef != 0.0f) {
      if (r > o.ratio_cap) d.clipped = kClippedCap;
    } else {
      const float moved = t.logprob - t.old_logprob;
      if ((A > 0.0f && moved > 0.0f && divergence > o.limit_high) ||
          (A < 0.0f && moved < 0.0f && divergence > o.limit_low)) {
        d.clipped = kClippedRegion;
        weight = 0.0f;
      }
    }
    d.g = -A * weight;
    // not a product: a weight of 0 on a log-probability of -inf is a loss of 0
    d.loss = held || d.g == 0.0f ? 0.0f : d.g * t.logprob;
  } else {
    const float q_raw = expf(t.old_logprob);
    const float q = q_raw > kMinProb ? q_raw : kMinProb;
    float low = 1.0f - o.eps_low, high = 1.0f + o.eps_high;
    if (o.surrogate == kDynamicClip) {  // DCPO eq. 6
      const float inside = 1.0f - 4.0f * o.eps_low / q;
      low = 0.5f + 0.5f * sqrtf(inside > 0.0f ? inside : 0.0f);
      high = 0.5f + 0.5f * sqrtf(1.0f + 4.0f * o.eps_high / q);
    } else if (o.surrogate == kInverseSqrtClip) {
      const float root = sqrtf(q);
      low = 1.0f - o.eps_low / root > 0.0f ? 1.0f - o.eps_low / root : 0.0f;
      high = 1.0f + o.eps_high / root;
    }
    if (high > o.ratio_max) high = o.ratio_max;
    float value = r;  // max(-A r, -A clip(r, low, high)), for A < 0 at most -A cap
    if (o.surrogate == kRatioMask) {  // IcePop's
      if (r < low || r > high) {
        value = 0.0f;
        d.clipped = kClippedRegion;
      }
    } else if (A > 0.0f && r > high) {
      value = high;
      d.clipped = kClippedHigh;
    } else if (A < 0.0f && r < low) {
      value = low;
      d.clipped = kClippedLow;
    } else if (A < 0.0f && r > o.ratio_cap) {
      value = o.ratio_cap;
      d.clipped = kClippedCap;
    }
    d.loss = -A * value;
    d.g = d.clipped == kClippedNone ? -A * r : 0.0f;
  }
  if (held) d.g = 0.0f;

  d.loss *= t.importance;
  d.g *= t.importance;
  if (o.kl_coef != 0.0f) {  // k3: exp(x) - x - 1, x = ref - logp
    const float x = t.ref_logprob - t.logprob, bounded = hold(x);
    d.loss += o.kl_coef * (expm1f(bounded) - bounded);
    if (!(fabsf(x) > kMaxLogRatio)) d.g -= o.kl_coef * expm1f(bounded);
  }
  if (o.entropy_coef != 0.0f) {
    d.loss -= o.entropy_coef * t.entropy;
    d.h = -o.entropy_coef;
  }
  if (o.penalty_coef != 0.0f) {
    const float excess = divergence - (A < 0.0f ? o.limit_low : o.limit_high);
    if (!(excess <= 0.0f)) {  // NaN comes through
      d.loss += o.penalty_coef * excess;
      if (binary)
        d.g += o.penalty_coef * binary_slope(o.divergence, t.logprob, t.old_logprob);
      else
        d.pull = o.penalty_coef;
    }
  }
  return d;
}

}  // namespace dcpo
