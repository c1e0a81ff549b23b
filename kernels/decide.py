"""Decide in Triton: what an objective says of one token, from its scalars alone.

The twin of dcpo_kernels/decide.py and csrc/decide.h, line for line. float32 throughout. Kinds and
optional terms are constexpr, every number is an argument: an annealed epsilon compiles nothing.
"""

import triton
import triton.language as tl

from dcpo_kernels import objective as objectives

CLIP, DYNAMIC_CLIP, INVERSE_SQRT_CLIP, REINFORCE_CLIP, REINFORCE = map(tl.constexpr, range(5))
SOFT_GATE, RATIO_MASK, QUADRATIC, DYNAMIC_QUADRATIC, GEOMETRIC_CLIP, GAMMA = map(
    tl.constexpr, range(5, 11)
)
NO_DIVERGENCE, BINARY_TV, BINARY_KL, TOPK_TV, TOPK_KL, FULL_TV, FULL_KL = map(
    tl.constexpr, range(len(objectives.DIVERGENCES))
)
NO_ROLLOUT, TRUNCATE, MASK = map(tl.constexpr, range(len(objectives.ROLLOUT_MODES)))
K1, K2, K3, ABS, K3_PLUS, K3_UNBIASED = map(tl.constexpr, range(len(objectives.KL_ESTIMATORS)))
CLIP_NONE, CLIP_HIGH, CLIP_LOW, CLIP_CAP, CLIP_REGION = map(
    tl.constexpr, range(len(objectives.CLIPPED))
)
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
def clamp_log_ratio(log_ratio):
    """Within +-MAX_LOG_RATIO; the comparisons let NaN through."""
    x = tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
    return tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x)


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
def rollout_weight(log_ratio, rollout_low, rollout_high, ROLLOUT_MODE: tl.constexpr):
    """What the policy term is multiplied with because another engine sampled; log_ratio: q to its
    probability there."""
    w = tl.exp(clamp_log_ratio(log_ratio))
    below, above = w < rollout_low, w > rollout_high
    if ROLLOUT_MODE == TRUNCATE:
        return tl.where(below, rollout_low, tl.where(above, rollout_high, w))
    else:
        return tl.where(below | above, 0.0, w)


@triton.jit
def log_ratio_part(logprob, old_logprob, A, importance, eps_low, eps_high, SURROGATE: tl.constexpr):
    """What a token adds to its response's log-ratio, which is their mean, for GAMMA their sum."""
    x = logprob - old_logprob
    if SURROGATE == GEOMETRIC_CLIP:  # GMPO (arXiv 2507.20673 eq. 5)
        x = tl.where((A > 0) & (x > eps_high), eps_high, x)
        x = tl.where((A < 0) & (x < -eps_low), -eps_low, x)
    elif SURROGATE == GAMMA:
        x += tl.log(importance)
    return x


@triton.jit
def kl_term(logprob, anchor, r, saturated, ESTIMATOR: tl.constexpr):
    """An estimate of KL(policy || anchor) from the sampled token, its derivative in logprob, and
    the part of that which comes through the ratio. saturated: where the ratio r is a constant."""
    held = tl.abs(anchor - logprob) > MAX_LOG_RATIO
    d = clamp_log_ratio(anchor - logprob)
    through_ratio = 0.0
    if ESTIMATOR == K1:
        value = -d
        slope = tl.where(d == d, 1.0, d)
    elif ESTIMATOR == K2:
        value = d * d / 2
        slope = -d
    elif ESTIMATOR == ABS:
        value = tl.abs(d)
        slope = -sign(d)
    else:
        value = expm1(d) - d
        slope = -expm1(d)
        if ESTIMATOR == K3_PLUS:  # k3's value with k2's gradient (verl)
            slope = -d
        elif ESTIMATOR == K3_UNBIASED:  # times the ratio, and its gradient through both
            through_ratio = tl.where(saturated, 0.0, r * value)
            slope = tl.where(saturated, r * slope, -r * d)
            value = r * value
    return value, tl.where(held, through_ratio, slope), through_ratio


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
    floor_low,
    floor_high,
    power_low,
    power_high,
    limit_low,
    limit_high,
    kl_coef,
    old_kl_coef,
    entropy_coef,
    penalty_coef,
    SURROGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    KL: tl.constexpr,  # its estimator; None: no such term
    OLD_KL: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
    WITH_PENALTY: tl.constexpr,
    log_ratio=None,  # of the whole response, in the place of the token's own
):
    """loss, g = dloss/dlogprob, h = dloss/dentropy, ratio, clipped, and dloss/ddivergence of a
    penalty on a top-K or full divergence (a binary one's is in g), and the part of g that comes
    through the ratio. A NaN among the log-probs makes
    all of loss, g and ratio NaN: every comparison below is false for it."""
    A = advantage
    if log_ratio is None:
        log_ratio = logprob - old_logprob
    saturated = tl.abs(log_ratio) > MAX_LOG_RATIO  # there the ratio is a constant; false for NaN
    r = tl.exp(clamp_log_ratio(log_ratio))
    clipped = CLIP_NONE
    BINARY: tl.constexpr = DIVERGENCE == BINARY_TV or DIVERGENCE == BINARY_KL
    MASKS: tl.constexpr = DIVERGENCE != NO_DIVERGENCE and not WITH_PENALTY
    if BINARY:
        divergence = binary_divergence(logprob, old_logprob, DIVERGENCE)

    if SURROGATE == SOFT_GATE:
        # SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1)), f'(1) = 1
        tau = tl.where(A > 0, eps_high, eps_low)
        gate = 1 / (1 + tl.exp(-tau * (r - 1)))
        loss = -A * 4 / tau * gate
        g = -A * 4 * (gate * (1 - gate)) * r
    elif SURROGATE == REINFORCE:
        floor = tl.where(A < 0, floor_low, floor_high)
        weight = tl.where(r > ratio_cap, ratio_cap, tl.where(r < floor, floor, r))
        if not MASKS:
            moves = floor < ratio_cap  # else the weight is one constant, and nothing is clipped
            clipped = tl.where(moves & (r > ratio_cap), CLIP_CAP, CLIP_NONE)
            clipped = tl.where(moves & (r < floor), CLIP_LOW, clipped)
        else:
            further_up = (A > 0) & (log_ratio > 0) & (divergence > limit_high)
            further_down = (A < 0) & (log_ratio < 0) & (divergence > limit_low)
            clipped = tl.where(further_up | further_down, CLIP_REGION, CLIP_NONE)
            weight = tl.where(further_up | further_down, 0.0, weight)
        g = -A * weight
        # not a product: a weight of 0 on a log-probability of -inf is a loss of 0
        loss = tl.where(saturated | (g == 0), 0.0, g * logprob)
    elif SURROGATE == GEOMETRIC_CLIP:
        # The loss is that of the response's ratio; a clipped token has no share in its gradient.
        own = logprob - old_logprob
        clipped = tl.where((A < 0) & (own < -eps_low), CLIP_LOW, CLIP_NONE)
        clipped = tl.where((A > 0) & (own > eps_high), CLIP_HIGH, clipped)
        loss = -A * r
        g = tl.where(clipped == CLIP_NONE, -A * r, 0.0)
    elif SURROGATE == GAMMA:
        # VESPO (arXiv 2602.10693): w^k exp(lambda (1 - w)), 1 at w = 1
        log_weight = tl.where(A < 0, power_low, power_high) * clamp_log_ratio(log_ratio)
        g = -A * tl.exp(log_weight + tl.where(A < 0, eps_low, eps_high) * (1 - r))
        loss = tl.where(saturated | (g == 0), 0.0, g * logprob)
    elif SURROGATE == QUADRATIC or SURROGATE == DYNAMIC_QUADRATIC:
        # SPO (arXiv 2401.16025 eq. 11), and DRPO (arXiv 2606.09821) weighted with q
        pull = tl.abs(A) / tl.where(A < 0, eps_low, eps_high)
        if SURROGATE == DYNAMIC_QUADRATIC:
            pull = pull * tl.exp(old_logprob)
        loss = -A * r + pull * ((r - 1) * (r - 1)) / 2
        g = (-A + pull * (r - 1)) * r
    else:
        low, high = clip_bounds(old_logprob, eps_low, eps_high, ratio_max, SURROGATE)
        x = r
        if SURROGATE == REINFORCE_CLIP:  # UP-GRPO (arXiv 2607.06987): A > 0 against itself
            x = tl.where((A > 0) & (r == r), 1.0, r)
        if SURROGATE == RATIO_MASK:
            outside = (x < low) | (x > high)
            if MASKS:
                outside = outside | (divergence > tl.where(A < 0, limit_low, limit_high))
            clipped = tl.where(outside, CLIP_REGION, CLIP_NONE)
            value = tl.where(outside, 0.0, x)
        else:
            # max(-A r, -A clip(r, low, high)), and for A < 0 at most -A cap (DCPO eq. 5; arXiv
            # 1912.09729 eq. 5). From the weakest rule to the strongest.
            clipped = tl.where((A < 0) & (x > ratio_cap), CLIP_CAP, CLIP_NONE)
            clipped = tl.where((A < 0) & (x < low), CLIP_LOW, clipped)
            clipped = tl.where((A > 0) & (x > high), CLIP_HIGH, clipped)
            value = tl.where(clipped == CLIP_CAP, ratio_cap, x)
            value = tl.where(clipped == CLIP_LOW, low, value)
            value = tl.where(clipped == CLIP_HIGH, high, value)
        loss = -A * value
        g = tl.where(clipped == CLIP_NONE, -A * x, 0.0)
    g = tl.where(saturated, 0.0, g)

    if SURROGATE != GAMMA:
        loss *= importance
        g *= importance
    through_ratio = g
    if SURROGATE == REINFORCE or SURROGATE == GAMMA:
        through_ratio = 0.0
    elif SURROGATE == REINFORCE_CLIP:
        through_ratio = tl.where(A > 0, 0.0, g)
    elif SURROGATE == GEOMETRIC_CLIP:
        through_ratio = tl.where(saturated, 0.0, loss)
    if KL is not None:
        kl, slope, through = kl_term(logprob, ref_logprob, r, saturated, KL)
        loss += kl_coef * kl
        g += kl_coef * slope
        through_ratio += kl_coef * through
    if OLD_KL is not None:
        kl, slope, through = kl_term(logprob, old_logprob, r, saturated, OLD_KL)
        loss += old_kl_coef * kl
        g += old_kl_coef * slope
        through_ratio += old_kl_coef * through
    h = 0.0
    if WITH_ENTROPY_TERM:
        loss -= entropy_coef * entropy
        h = -entropy_coef
    divergence_coef = 0.0
    if WITH_PENALTY:
        excess = divergence - tl.where(A < 0, limit_low, limit_high)
        loss += tl.where(excess <= 0, 0.0, penalty_coef * excess)
        if BINARY:
            slope = binary_slope(logprob, old_logprob, DIVERGENCE)
            g += tl.where(excess <= 0, 0.0, penalty_coef * slope)
        else:
            divergence_coef = tl.where(excess <= 0, 0.0, penalty_coef)  # a NaN exceeds
    return loss, g, h, r, clipped, divergence_coef, through_ratio
