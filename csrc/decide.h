// Decide: the loss of a token and its derivatives, from the token's scalars.
//
// dcpo_kernels/decide.py and kernels/decide.py are the same, line for line. float32 throughout;
// included by the CPU and the CUDA kernels.
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

// A code is the index of its name, which is spelled as in dcpo_kernels/objective.py. Python
// compares the names when it loads the module.
enum Surrogate : int {
  kClip,
  kDynamicClip,
  kInverseSqrtClip,
  kReinforceClip,
  kReinforce,
  kSoftGate,
  kRatioMask,
  kQuadratic,
  kDynamicQuadratic,
  kGeometricClip,
  kGamma
};
constexpr const char* kSurrogates[] = {
    "clip",       "dynamic-clip", "inverse-sqrt-clip", "reinforce-clip", "reinforce", "soft-gate",
    "ratio-mask", "quadratic",    "dynamic-quadratic", "geometric-clip", "gamma"};

enum Divergence : int { kNone, kBinaryTv, kBinaryKl, kTopkTv, kTopkKl, kFullTv, kFullKl };
constexpr const char* kDivergences[] = {"none",    "binary_tv", "binary_kl", "topk_tv",
                                        "topk_kl", "tv",        "kl"};

enum KlEstimator : int { kK1, kK2, kK3, kAbs, kK3Plus, kK3Unbiased };
enum RolloutMode : int { kNoRollout, kTruncate, kMask };
constexpr const char* kRolloutModes[] = {"none", "truncate", "mask"};
constexpr const char* kKlEstimators[] = {"k1", "k2", "k3", "abs", "k3+", "k3_unbiased"};

enum Clipped : int8_t { kClippedNone, kClippedHigh, kClippedLow, kClippedCap, kClippedRegion };
constexpr const char* kClipped[] = {"none", "high", "low", "cap", "region"};

// |logp - old_logp| and |ref_logp - logp| are clamped to it before exp.
constexpr float kMaxLogRatio = 20.0f;
// The smallest normal: q = 0 and denormal q must not give 0/0.
constexpr float kMinProb = 1.17549435e-38f;
// Lower bound on the probability of all tokens that a top-K divergence does not list.
constexpr float kMinRest = 1e-12f;
// Ids per row of a top-K divergence.
constexpr int kMaxK = 128;

struct Objective {
  int surrogate, divergence, kl_estimator, old_kl_estimator, rollout_mode;
  float eps_low, eps_high;  // low: for A < 0, high: for A >= 0
  float ratio_max, ratio_cap;
  float floor_low, floor_high;
  float power_low, power_high;
  float limit_low, limit_high;
  float kl_coef, old_kl_coef, entropy_coef, penalty_coef;
  float rollout_low, rollout_high;
};

struct Token {
  float logprob, old_logprob, advantage;
  float importance;  // multiplies the policy term; 1 where there is none
  float ref_logprob, entropy;
  float divergence;  // top-K and full divergences; binary ones are computed here
  float log_ratio;   // logprob - old_logprob, or the mean of that over the response (GSPO)
};

struct Decision {
  float loss;
  float g;  // dloss/dlogprob
  float h;  // dloss/dentropy
  float ratio;
  Clipped clipped;
  float through_ratio;    // the part of g that comes through the ratio
  float divergence_coef;  // dloss/ddivergence of a penalty on a top-K or full divergence; a binary
                          // one's is in g
};

DCPO_HD bool needs_topk(const Objective& o) {
  return o.divergence == kTopkTv || o.divergence == kTopkKl;
}
DCPO_HD bool needs_old_logits(const Objective& o) {
  return o.divergence == kFullTv || o.divergence == kFullKl;
}
DCPO_HD float clamp_log_ratio(float x) {  // NaN comes through
  return x > kMaxLogRatio ? kMaxLogRatio : x < -kMaxLogRatio ? -kMaxLogRatio : x;
}

// Whether the divergence stops gradients; with penalty_coef it is a penalty instead.
DCPO_HD bool masks(const Objective& o) { return o.divergence != kNone && o.penalty_coef == 0.0f; }

// What the policy term is multiplied with because another engine sampled; log_ratio: q to its
// probability there.
DCPO_HD float rollout_weight(const Objective& o, float log_ratio) {
  const float w = expf(clamp_log_ratio(log_ratio));
  const bool below = w<o.rollout_low, above = w> o.rollout_high;
  if (o.rollout_mode == kTruncate) return below ? o.rollout_low : above ? o.rollout_high : w;
  return below || above ? 0.0f : w;
}

DCPO_HD float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }

// Divergence between two policies told apart by the sampled token alone (DPPO section 4).
DCPO_HD float binary_divergence(int kind, float logp, float old_logp) {
  const float p = expf(logp), q = expf(old_logp);
  if (kind == kBinaryTv) return fabsf(p - q);
  // log(1 - p) from expm1: 1 - exp(logp) has no digits left where logp is near 0
  const float not_p = -expm1f(logp), not_q = -expm1f(old_logp);
  const float inside = q > 0.0f ? q * (old_logp - logp) : 0.0f;
  const float log_not_p = logf(not_p < kMinRest ? kMinRest : not_p);
  return inside + (not_q > 0.0f ? not_q * (logf(not_q) - log_not_p) : 0.0f);
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
  const bool clamped = rest_p < kMinRest;
  if (kind == kTopkTv) return 0.5f * p * (sign(p - q) - (clamped ? 0.0f : sign(rest_p - rest_q)));
  return (clamped ? 0.0f : p * rest_q / rest_p) - q;
}

struct ClipBounds {
  float low, high;
};

// Lower and upper bound on the ratio. The maxima keep q = 0 from giving inf * 0.
DCPO_HD ClipBounds clip_bounds(const Objective& o, float old_logprob) {
  const float q = fmaxf(expf(old_logprob), kMinProb);
  float low, high;
  if (o.surrogate == kDynamicClip) {  // DCPO eq. 6
    low = 0.5f + 0.5f * sqrtf(fmaxf(1.0f - 4.0f * o.eps_low / q, 0.0f));
    high = 0.5f + 0.5f * sqrtf(1.0f + 4.0f * o.eps_high / q);
  } else if (o.surrogate == kInverseSqrtClip) {
    low = fmaxf(1.0f - o.eps_low / sqrtf(q), 0.0f);
    high = 1.0f + o.eps_high / sqrtf(q);
  } else {
    low = 1.0f - o.eps_low;
    high = 1.0f + o.eps_high;
  }
  return {low, fminf(high, o.ratio_max)};
}

// What a token adds to its response's log-ratio, which is their mean, for kGamma their sum.
DCPO_HD float log_ratio_part(const Objective& o, const Token& t) {
  float x = t.logprob - t.old_logprob;
  if (o.surrogate == kGeometricClip) {  // GMPO (arXiv 2507.20673 eq. 5)
    if (t.advantage > 0.0f && x > o.eps_high) x = o.eps_high;
    if (t.advantage < 0.0f && x < -o.eps_low) x = -o.eps_low;
  } else if (o.surrogate == kGamma) {
    x += logf(t.importance);
  }
  return x;
}

struct KlTerm {
  float value, slope, through_ratio;
};

// An estimate of KL(policy || anchor) from the sampled token, its derivative in logprob, and the
// part of that which comes through the ratio. saturated: the ratio r is a constant.
DCPO_HD KlTerm kl_term(int estimator, float logprob, float anchor, float r, bool saturated) {
  const bool held = fabsf(anchor - logprob) > kMaxLogRatio;
  const float d = clamp_log_ratio(anchor - logprob);
  float value, slope, through_ratio = 0.0f;
  if (estimator == kK1) {
    value = -d;
    slope = d == d ? 1.0f : d;
  } else if (estimator == kK2) {
    value = d * d / 2.0f;
    slope = -d;
  } else if (estimator == kAbs) {
    value = fabsf(d);
    slope = -sign(d);
  } else {
    value = expm1f(d) - d;
    slope = -expm1f(d);
    if (estimator == kK3Plus) {  // k3's value with k2's gradient (verl)
      slope = -d;
    } else if (estimator == kK3Unbiased) {  // times the ratio, and its gradient through both
      through_ratio = saturated ? 0.0f : r * value;
      slope = saturated ? r * slope : -r * d;
      value *= r;
    }
  }
  return {value, held ? through_ratio : slope, through_ratio};
}

// A NaN among the log-probs makes all of loss, g and ratio NaN: every comparison is false for it.
DCPO_HD Decision decide(const Objective& o, const Token& t) {
  const float A = t.advantage;
  const bool saturated = fabsf(t.log_ratio) > kMaxLogRatio;  // there the ratio is a constant
  const float r = expf(clamp_log_ratio(t.log_ratio));
  Clipped clipped = kClippedNone;
  const bool binary = o.divergence == kBinaryTv || o.divergence == kBinaryKl;
  float divergence = t.divergence, loss, g;
  if (binary) divergence = binary_divergence(o.divergence, t.logprob, t.old_logprob);

  if (o.surrogate == kSoftGate) {
    // SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1)), f'(1) = 1
    const float tau = A > 0.0f ? o.eps_high : o.eps_low;
    const float gate = 1.0f / (1.0f + expf(-tau * (r - 1.0f)));
    loss = -A * 4.0f / tau * gate;
    g = -A * 4.0f * (gate * (1.0f - gate)) * r;
  } else if (o.surrogate == kReinforce) {
    const float floor = A < 0.0f ? o.floor_low : o.floor_high;
    float weight = r > o.ratio_cap ? o.ratio_cap : r < floor ? floor : r;
    if (!masks(o)) {
      const bool moves = floor < o.ratio_cap;  // else the weight is one constant
      if (moves && r > o.ratio_cap) clipped = kClippedCap;
      if (moves && r < floor) clipped = kClippedLow;
    } else {
      const bool further_up = A > 0.0f && t.log_ratio > 0.0f && divergence > o.limit_high;
      const bool further_down = A < 0.0f && t.log_ratio < 0.0f && divergence > o.limit_low;
      if (further_up || further_down) clipped = kClippedRegion;
      if (further_up || further_down) weight = 0.0f;
    }
    g = -A * weight;
    // not a product: a weight of 0 on a log-probability of -inf is a loss of 0
    loss = saturated || g == 0.0f ? 0.0f : g * t.logprob;
  } else if (o.surrogate == kGeometricClip) {
    // The loss is that of the response's ratio; a clipped token has no share in its gradient.
    const float own = t.logprob - t.old_logprob;
    if (A < 0.0f && own < -o.eps_low) clipped = kClippedLow;
    if (A > 0.0f && own > o.eps_high) clipped = kClippedHigh;
    loss = -A * r;
    g = clipped == kClippedNone ? -A * r : 0.0f;
  } else if (o.surrogate == kGamma) {
    // VESPO (arXiv 2602.10693): w^k exp(lambda (1 - w)), 1 at w = 1
    const float log_weight = (A < 0.0f ? o.power_low : o.power_high) * clamp_log_ratio(t.log_ratio);
    g = -A * expf(log_weight + (A < 0.0f ? o.eps_low : o.eps_high) * (1.0f - r));
    loss = saturated || g == 0.0f ? 0.0f : g * t.logprob;
  } else if (o.surrogate == kQuadratic || o.surrogate == kDynamicQuadratic) {
    // SPO (arXiv 2401.16025 eq. 11), and DRPO (arXiv 2606.09821) weighted with q
    float pull = fabsf(A) / (A < 0.0f ? o.eps_low : o.eps_high);
    if (o.surrogate == kDynamicQuadratic) pull *= expf(t.old_logprob);
    loss = -A * r + pull * ((r - 1.0f) * (r - 1.0f)) / 2.0f;
    g = (-A + pull * (r - 1.0f)) * r;
  } else {
    const auto [low, high] = clip_bounds(o, t.old_logprob);
    // UP-GRPO (arXiv 2607.06987): A > 0 against itself; NaN stays
    const float x = o.surrogate == kReinforceClip && A > 0.0f && r == r ? 1.0f : r;
    float value;
    if (o.surrogate == kRatioMask) {
      bool outside = x < low || x > high;
      if (masks(o)) outside = outside || divergence > (A < 0.0f ? o.limit_low : o.limit_high);
      if (outside) clipped = kClippedRegion;
      value = outside ? 0.0f : x;
    } else {
      // max(-A r, -A clip(r, low, high)), and for A < 0 at most -A cap (DCPO eq. 5; arXiv
      // 1912.09729 eq. 5). From the weakest rule to the strongest.
      if (A < 0.0f && x > o.ratio_cap) clipped = kClippedCap;
      if (A < 0.0f && x < low) clipped = kClippedLow;
      if (A > 0.0f && x > high) clipped = kClippedHigh;
      value = clipped == kClippedCap ? o.ratio_cap : x;
      value = clipped == kClippedLow ? low : value;
      value = clipped == kClippedHigh ? high : value;
    }
    loss = -A * value;
    g = clipped == kClippedNone ? -A * x : 0.0f;
  }
  if (saturated) g = 0.0f;

  if (o.surrogate != kGamma) {
    loss *= t.importance;
    g *= t.importance;
  }
  float through_ratio = g;
  if (o.surrogate == kReinforce || o.surrogate == kGamma)
    through_ratio = 0.0f;
  else if (o.surrogate == kReinforceClip && A > 0.0f)
    through_ratio = 0.0f;
  else if (o.surrogate == kGeometricClip)
    through_ratio = saturated ? 0.0f : loss;
  if (o.kl_coef != 0.0f) {
    const KlTerm kl = kl_term(o.kl_estimator, t.logprob, t.ref_logprob, r, saturated);
    loss += o.kl_coef * kl.value;
    g += o.kl_coef * kl.slope;
    through_ratio += o.kl_coef * kl.through_ratio;
  }
  if (o.old_kl_coef != 0.0f) {
    const KlTerm kl = kl_term(o.old_kl_estimator, t.logprob, t.old_logprob, r, saturated);
    loss += o.old_kl_coef * kl.value;
    g += o.old_kl_coef * kl.slope;
    through_ratio += o.old_kl_coef * kl.through_ratio;
  }
  float h = 0.0f;
  if (o.entropy_coef != 0.0f) {
    loss -= o.entropy_coef * t.entropy;
    h = -o.entropy_coef;
  }
  float divergence_coef = 0.0f;
  if (o.penalty_coef != 0.0f) {
    const float excess = divergence - (A < 0.0f ? o.limit_low : o.limit_high);
    loss += excess <= 0.0f ? 0.0f : o.penalty_coef * excess;
    if (binary) {
      const float slope = binary_slope(o.divergence, t.logprob, t.old_logprob);
      g += excess <= 0.0f ? 0.0f : o.penalty_coef * slope;
    } else {
      divergence_coef = excess <= 0.0f ? 0.0f : o.penalty_coef;  // a NaN exceeds
    }
  }
  return {loss, g, h, r, clipped, through_ratio, divergence_coef};
}

}  // namespace dcpo
