"""Decide in Triton: what an objective says of one token, from its scalars alone.

The twin of `decide` in dcpo_kernels/objectives.py and csrc/objective.h. float32 throughout. Kinds
and optional terms are constexpr, every number is an argument: an annealed epsilon compiles nothing.
"""

import triton
import triton.language as tl

from dcpo_kernels import objective as objectives

CLIP = tl.constexpr(objectives.SURROGATES.index("clip"))
DYNAMIC_CLIP = tl.constexpr(objectives.SURROGATES.index("dynamic-clip"))
INVERSE_SQRT_CLIP = tl.constexpr(objectives.SURROGATES.index("inverse-sqrt-clip"))
REINFORCE = tl.constexpr(objectives.SURROGATES.index("reinforce"))
SOFT_GATE = tl.constexpr(objectives.SURROGATES.index("soft-gate"))
RATIO_MASK = tl.constexpr(objectives.SURROGATES.index("ratio-mask"))
NO_DIVERGENCE = tl.constexpr(objectives.DIVERGENCES.index("none"))
BINARY_TV = tl.constexpr(objectives.DIVERGENCES.index("binary_tv"))
BINARY_KL = tl.constexpr(objectives.DIVERGENCES.index("binary_kl"))
TOPK_TV = tl.constexpr(objectives.DIVERGENCES.index("topk_tv"))
TOPK_KL = tl.constexpr(objectives.DIVERGENCES.index("topk_kl"))
FULL_TV = tl.constexpr(objectives.DIVERGENCES.index("tv"))
FULL_KL = tl.constexpr(objectives.DIVERGENCES.index("kl"))
CLIP_NONE = tl.constexpr(objectives.CLIP_NONE)
CLIP_HIGH = tl.constexpr(objectives.CLIP_HIGH)
CLIP_LOW = tl.constexpr(objectives.CLIP_LOW)
CLIP_CAP = tl.constexpr(objectives.CLIP_CAP)
CLIP_REGION = tl.constexpr(objectives.CLIP_REGION)
MAX_LOG_RATIO = tl.constexpr(objectives.MAX_LOG_RATIO)
MIN_PROB = tl.constexpr(objectives.MIN_PROB)
MIN_REST = tl.constexpr(objectives.MIN_REST)


@triton.jit
def expm1(x):
    """exp(x) - 1, relative error below 5e-7 for any x. Triton has no expm1 outside of libdevice."""
    # Taylor's series; the first term left out is 1.1e-8 of the result at |x| = 1/2.
    p = x * (1 / 40320) + 1 / 5040
    p = p * x + 1 / 720
    p = p * x + 1 / 120
    p = p * x + 1 / 24
    p = p * x + 1 / 6
    p = p * x + 1 / 2
    p = p * x + 1
    return tl.where(tl.abs(x) < 0.5, p * x, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) without what is lost in the sum (Kahan): that loss is in both factors."""
    sum = 1 + x
    rounded = sum - 1
    return tl.where(rounded == 0, x, tl.log(sum) * (x / rounded))


@triton.jit
def hold(log_ratio):
    """Between -20 and 20; the comparisons let NaN through."""
    held = tl.where(log_ratio < -MAX_LOG_RATIO, -MAX_LOG_RATIO, log_ratio)
    return tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, held)


@triton.jit
def sign(x):
    """-1, 0 or 1, or NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def binary_divergence(logprob, old_logprob, DIVERGENCE: tl.constexpr):
    """Between two policies told apart by the sampled token alone (DPPO section 4)."""
    p, q = tl.exp(logprob), tl.exp(old_logprob)
    if DIVERGENCE == BINARY_TV:
        return tl.abs(p - q)
    # log(1 - p) from expm1: 1 - exp(logp) has no digits left where logp is near 0
    not_p, not_q = -expm1(logprob), -expm1(old_logprob)
    inside = tl.where(q > 0, q * (old_logprob - logprob), 0.0)
    log_not_p = tl.log(tl.where(not_p < MIN_REST, MIN_REST, not_p))
    return inside + tl.where(not_q > 0, not_q * (tl.log(not_q) - log_not_p), 0.0)


@triton.jit
def binary_slope(logprob, old_logprob, DIVERGENCE: tl.constexpr):
    """Its derivative in logprob."""
    p, q = tl.exp(logprob), tl.exp(old_logprob)
    if DIVERGENCE == BINARY_TV:
        return p * sign(p - q)
    not_p, not_q = -expm1(logprob), -expm1(old_logprob)
    return tl.where(not_p < MIN_REST, 0.0, not_q * p / not_p) - q


@triton.jit
def topk_divergence(logprobs, old_logprobs, DIVERGENCE: tl.constexpr):
    """Over listed tokens [K], -inf where there is none, and one bucket for the rest (DPPO section
    4.2)."""
    p, q = tl.exp(logprobs), tl.exp(old_logprobs)
    rest_p = tl.maximum(1 - tl.sum(p, 0), MIN_REST)
    rest_q = tl.maximum(1 - tl.sum(q, 0), MIN_REST)
    if DIVERGENCE == TOPK_TV:
        return 0.5 * (tl.sum(tl.abs(p - q), 0) + tl.abs(rest_p - rest_q))
    inside = tl.where(q > 0, q * (old_logprobs - logprobs), 0.0)
    return tl.sum(inside, 0) + rest_q * (tl.log(rest_q) - tl.log(rest_p))


@triton.jit
def topk_slopes(logprobs, old_logprobs, DIVERGENCE: tl.constexpr):
    """e [K]: the divergence's gradient is e - p sum(e) in a listed logit and -p sum(e) in any
    other, over T."""
    p, q = tl.exp(logprobs), tl.exp(old_logprobs)
    rest_p = 1 - tl.sum(p, 0)
    rest_q = tl.maximum(1 - tl.sum(q, 0), MIN_REST)
    held = rest_p < MIN_REST
    if DIVERGENCE == TOPK_TV:
        return 0.5 * p * (sign(p - q) - tl.where(held, 0.0, sign(rest_p - rest_q)))
    return tl.where(held, 0.0, p * rest_q / rest_p) - q


@triton.jit
def clip_bounds(old_logprob, eps_low, eps_high, ratio_max, SURROGATE: tl.constexpr):
    """Lower and upper bound on the ratio. The maxima keep q = 0 from giving inf * 0."""
    q = tl.maximum(tl.exp(old_logprob), MIN_PROB)
    if SURROGATE == DYNAMIC_CLIP:  # DCPO eq. 6
        low = 0.5 + 0.5 * tl.sqrt(tl.maximum(1 - 4 * eps_low / q, 0.0))
        high = 0.5 + 0.5 * tl.sqrt(1 + 4 * eps_high / q)
    elif SURROGATE == INVERSE_SQRT_CLIP:
        low = tl.maximum(1 - eps_low / tl.sqrt(q), 0.0)
        high = 1 + eps_high / tl.sqrt(q)
    else:
        low = 1 - eps_low
        high = 1 + eps_high
    return low, tl.minimum(high, ratio_max)


@triton.jit
def decide(
    logprob,
    old_logprob,
    advantage,
    importance,  # multiplies the policy term
    ref_logprob,
    entropy,
    divergence,  # top-K and full; the binary ones are computed here
    eps_low,
    eps_high,
    ratio_max,
    ratio_cap,
    limit_low,
    limit_high,
    kl_coef,
    entropy_coef,
    penalty_coef,
    SURROGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
    WITH_PENALTY: tl.constexpr,
    log_ratio=None,  # of the whole response, in the place of the token's own
):
    """loss, g = dloss/dlogprob, h = dloss/dentropy, ratio, clipped, and dloss/ddivergence of a
    penalty on a top-K or full divergence; a binary one's is in g. A NaN among the log-probs makes
    all of loss, g and ratio NaN: every comparison below is false for it."""
    A = advantage
    if log_ratio is None:
        log_ratio = logprob - old_logprob
    r = tl.exp(hold(log_ratio))
    held = tl.abs(log_ratio) > MAX_LOG_RATIO  # there the ratio is a constant
    clipped = CLIP_NONE
    BINARY: tl.constexpr = DIVERGENCE == BINARY_TV or DIVERGENCE == BINARY_KL
    if BINARY:
        divergence = binary_divergence(logprob, old_logprob, DIVERGENCE)

    if SURROGATE == SOFT_GATE:
        # SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1))
        tau = tl.where(A > 0, eps_high, eps_low)
        gate = 1 / (1 + tl.exp(-tau * (r - 1)))
        loss = -A * 4 / tau * gate
        g = -A * 4 * gate * (1 - gate) * r
    elif SURROGATE == REINFORCE:
        weight = tl.where(r > ratio_cap, ratio_cap, r)
        if DIVERGENCE == NO_DIVERGENCE or WITH_PENALTY:
            clipped = tl.where(r > ratio_cap, CLIP_CAP, CLIP_NONE)
        else:
            further_up = (A > 0) & (log_ratio > 0) & (divergence > limit_high)
            further_down = (A < 0) & (log_ratio < 0) & (divergence > limit_low)
            clipped = tl.where(further_up | further_down, CLIP_REGION, CLIP_NONE)
            weight = tl.where(further_up | further_down, 0.0, weight)
        g = -A * weight
        # not a product: a weight of 0 on a log-probability of -inf is a loss of 0
        loss = tl.where(held | (g == 0), 0.0, g * logprob)
    else:
        low, high = clip_bounds(old_logprob, eps_low, eps_high, ratio_max, SURROGATE)
        if SURROGATE == RATIO_MASK:  # IcePop's
            clipped = tl.where((r < low) | (r > high), CLIP_REGION, CLIP_NONE)
            value = tl.where(clipped == CLIP_REGION, 0.0, r)
        else:
            # max(-A r, -A clip(r, low, high)), for A < 0 at most -A cap (DCPO eq. 5; arXiv
            # 1912.09729 eq. 5). Written from the weakest rule to the strongest.
            clipped = tl.where((A < 0) & (r > ratio_cap), CLIP_CAP, CLIP_NONE)
            clipped = tl.where((A < 0) & (r < low), CLIP_LOW, clipped)
            clipped = tl.where((A > 0) & (r > high), CLIP_HIGH, clipped)
            value = tl.where(clipped == CLIP_CAP, ratio_cap, r)
            value = tl.where(clipped == CLIP_LOW, low, value)
            value = tl.where(clipped == CLIP_HIGH, high, value)
        loss = -A * value
        g = tl.where(clipped == CLIP_NONE, -A * r, 0.0)
    g = tl.where(held, 0.0, g)

    loss *= importance
    g *= importance
    h = 0.0
    if WITH_KL:  # k3: exp(d) - d - 1, d = ref - logp
        d = ref_logprob - logprob
        bounded = hold(d)
        loss += kl_coef * (expm1(bounded) - bounded)
        g -= tl.where(tl.abs(d) > MAX_LOG_RATIO, 0.0, kl_coef * expm1(bounded))
    if WITH_ENTROPY_TERM:
        loss -= entropy_coef * entropy
        h = -entropy_coef
    pull = 0.0
    if WITH_PENALTY:
        excess = divergence - tl.where(A < 0, limit_low, limit_high)
        beyond = tl.where(excess <= 0, 0.0, penalty_coef)  # a NaN is beyond
        loss += tl.where(excess <= 0, 0.0, penalty_coef * excess)
        if BINARY:
            slope = binary_slope(logprob, old_logprob, DIVERGENCE)
            g += tl.where(excess <= 0, 0.0, penalty_coef * slope)
        else:
            pull = beyond
    return loss, g, h, r, clipped, pull
