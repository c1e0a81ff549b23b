"""Decide: what the log-probability of a token is worth, and the gradient that follows from it.

The formulas in plain PyTorch. kernels/decide.py and csrc/decide.h are the same, line for line, and
are tested against this one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.objective import (
    CLIP_CAP,
    CLIP_HIGH,
    CLIP_LOW,
    CLIP_NONE,
    CLIP_REGION,
    DIVERGENCES,
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    MIN_PROB,
    MIN_REST,
    ROLLOUT_MODES,
    Numbers,
)

CLIP, DYNAMIC_CLIP, INVERSE_SQRT_CLIP, REINFORCE_CLIP, REINFORCE = range(5)
SOFT_GATE, RATIO_MASK, QUADRATIC, DYNAMIC_QUADRATIC, GEOMETRIC_CLIP, GAMMA = range(5, 11)
NO_ROLLOUT, TRUNCATE, MASK = range(len(ROLLOUT_MODES))
NO_DIVERGENCE, BINARY_TV, BINARY_KL, TOPK_TV, TOPK_KL, FULL_TV, FULL_KL = range(len(DIVERGENCES))
K1, K2, K3, ABS, K3_PLUS, K3_UNBIASED = range(len(KL_ESTIMATORS))


class Decision(NamedTuple):
    """What an objective says of each token, before any weight. All of the shape of the
    log-probabilities."""

    loss: Tensor  # differentiable in the log-probabilities, the entropy and the divergence
    g: Tensor  # dloss/dlogp; dloss/dH is -entropy_coef
    ratio: Tensor
    clipped: Tensor  # int8, CLIP_*
    through_ratio: Tensor  # the part of g that comes through the ratio
    divergence_coef: Tensor  # dloss/ddivergence of a centre or a penalty on a top-K or full
    # divergence; a binary one's is in g


def clip_bounds(o: Numbers, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound on the ratio, of the shape of old_logprobs.

    DCPO eq. 6: |r - 1| r q <= eps solved for r. The clamps keep q = 0 from giving inf * 0.
    """
    q = old_logprobs.exp().clamp(min=MIN_PROB)
    if o.surrogate == DYNAMIC_CLIP:
        low = 0.5 + 0.5 * (1 - 4 * o.eps_low / q).clamp(min=0).sqrt()
        high = 0.5 + 0.5 * (1 + 4 * o.eps_high / q).sqrt()
    elif o.surrogate == INVERSE_SQRT_CLIP:
        low = (1 - o.eps_low / q.sqrt()).clamp(min=0)
        high = 1 + o.eps_high / q.sqrt()
    else:
        low = torch.full_like(q, 1 - o.eps_low)
        high = torch.full_like(q, 1 + o.eps_high)
    return low, high.clamp(max=o.ratio_max)


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO. Unlike clamp it hands on the gradient of a NaN: where the loss is
    NaN, a gradient of 0 would hide it."""
    x = torch.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
    return torch.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x)


def by_sign(A: Tensor, low: float, high: float) -> Tensor:
    """low where A < 0, else high."""
    return torch.full_like(A, high).masked_fill(A < 0, low)


def rollout_weight(o: Numbers, log_ratio: Tensor) -> Tensor:
    """What the policy term is multiplied with because another engine sampled; log_ratio: q to its
    probability there."""
    w = clamp_log_ratio(log_ratio).exp().detach()
    below, above = w < o.rollout_low, w > o.rollout_high
    if o.rollout_mode == TRUNCATE:
        return torch.where(below, o.rollout_low, torch.where(above, o.rollout_high, w))
    return torch.where(below | above, 0.0, w)


def cut_weight(o: Numbers, A: Tensor, r: Tensor) -> Tensor:
    """The weight that REINFORCE makes of a ratio."""
    floor = by_sign(A, o.floor_low, o.floor_high)
    return torch.where(r > o.ratio_cap, o.ratio_cap, torch.where(r < floor, floor, r))


def is_binary(o: Numbers) -> bool:
    return o.divergence in (BINARY_TV, BINARY_KL)


def masks(o: Numbers) -> bool:
    """Whether the divergence stops gradients; with penalty_coef it is a penalty instead."""
    return o.divergence != NO_DIVERGENCE and o.penalty_coef == 0


def binary_divergence(kind: int, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Divergence between two policies that are only told apart by the sampled token (DPPO section
    4)."""
    p, q = logprobs.exp(), old_logprobs.exp()
    if kind == BINARY_TV:
        return (p - q).abs()
    # 1 - p from expm1: 1 - exp(logp) has no digits left where logp is near 0.
    not_p, not_q = (-torch.expm1(x) for x in (logprobs, old_logprobs))
    inside = torch.where(q > 0, q * (old_logprobs - logprobs), 0.0)
    rest = not_q * (not_q.log() - not_p.clamp(min=MIN_REST).log())
    return inside + torch.where(not_q > 0, rest, 0.0)


def binary_slope(kind: int, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Its derivative in logprobs."""
    p, q = logprobs.exp(), old_logprobs.exp()
    if kind == BINARY_TV:
        return (p - q).sign() * p
    not_p, not_q = -torch.expm1(logprobs), -torch.expm1(old_logprobs)
    return torch.where(not_p < MIN_REST, 0.0, not_q * p / not_p) - q


def log_ratio_part(
    o: Numbers, logprobs: Tensor, old_logprobs: Tensor, A: Tensor, importance: Tensor
) -> Tensor:
    """What each token adds to its response's log-ratio, which is their mean, for GAMMA their
    sum."""
    x = logprobs - old_logprobs
    if o.surrogate == GEOMETRIC_CLIP:  # GMPO (arXiv 2507.20673 eq. 5)
        x = torch.where((A > 0) & (x > o.eps_high), o.eps_high, x)
        x = torch.where((A < 0) & (x < -o.eps_low), -o.eps_low, x)
    elif o.surrogate == GAMMA:
        x = x + importance.log()
    return x


def kl_term(
    estimator: int, logprobs: Tensor, anchor: Tensor, ratio: Tensor, saturated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An estimate of KL(policy || anchor) from the sampled token, its derivative in logprobs, and
    the part of that which comes through the ratio.

    saturated: where the ratio is a constant.
    """
    d, r = anchor - logprobs, ratio.detach()
    held = d.abs() > MAX_LOG_RATIO
    # NaN, also where a derivative would not ask for the anchor
    d = clamp_log_ratio(d) * torch.where(d.isnan(), d, 1.0).detach()
    through_ratio = torch.zeros_like(r)
    if estimator == K1:
        value = -d
        slope = torch.where(d.isnan(), d, 1.0)
    elif estimator == K2:
        value = d * d / 2
        slope = -d
    elif estimator == ABS:
        value = d.abs()
        slope = torch.where(d.isnan(), d, -d.sign())
    else:
        value = torch.expm1(d) - d
        slope = -torch.expm1(d)
        if estimator == K3_PLUS:  # k3's value with k2's gradient (verl)
            value = value.detach() + (d * d - (d * d).detach()) / 2
            slope = -d
        elif estimator == K3_UNBIASED:  # times the ratio, and its gradient through both
            through_ratio = torch.where(saturated, 0.0, r * value).detach()
            slope = torch.where(saturated, r * slope, -r * d)
            value = ratio * value
    return value, torch.where(held, through_ratio, slope).detach(), through_ratio


def decide(
    o: Numbers,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    log_ratio: Tensor | None = None,
    divergence: Tensor | None = None,
) -> Decision:
    """The loss of each token and its derivative, from the token's scalars. All arguments have one
    shape, any float dtype.

    log_ratio: replaces logp - old_logp in the ratio (a response's mean for ratio_level="sequence");
    the gradient still goes to the token's own log-probability, s * exp(logp - stop(logp)) (GSPO eq.
    14).
    divergence: the token's, where it takes more than the sampled token to know it (top-K, full);
    with score_centering its centre.
    """
    A = advantages
    if log_ratio is None:
        log_ratio = logprobs - old_logprobs
    else:
        own = torch.where(logprobs.isinf(), 0.0, logprobs - logprobs.detach())
        log_ratio = log_ratio.detach() + own
    saturated = log_ratio.abs() > MAX_LOG_RATIO  # there the ratio is a constant; false for NaN
    ratio = clamp_log_ratio(log_ratio).exp()
    r = ratio.detach()
    clipped = torch.full_like(r, CLIP_NONE, dtype=torch.int8)
    if is_binary(o):
        divergence = binary_divergence(o.divergence, logprobs, old_logprobs)

    if o.surrogate == SOFT_GATE:
        # SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1)), f'(1) = 1
        tau = torch.where(A > 0, o.eps_high, o.eps_low)
        gate = torch.sigmoid(tau * (ratio - 1))
        loss = -A * 4 / tau * gate
        g = -A * 4 * (gate * (1 - gate)).detach() * r
    elif o.surrogate == REINFORCE:
        floor = by_sign(A, o.floor_low, o.floor_high)
        weight = cut_weight(o, A, r)
        if not masks(o):
            moves = floor < o.ratio_cap  # else the weight is one constant, and nothing is clipped
            clipped = torch.where(moves & (r > o.ratio_cap), CLIP_CAP, clipped)
            clipped = torch.where(moves & (r < floor), CLIP_LOW, clipped)
        else:
            assert divergence is not None
            further_up = (A > 0) & (log_ratio > 0) & (divergence > o.limit_high)
            further_down = (A < 0) & (log_ratio < 0) & (divergence > o.limit_low)
            clipped = torch.where(further_up | further_down, CLIP_REGION, clipped)
            weight = torch.where(further_up | further_down, 0.0, weight)
        g = -A * weight
        # not a product: a weight of 0 on a log-probability of -inf is a loss of 0
        loss = torch.where(saturated | (g == 0), 0.0, g * logprobs)
    elif o.surrogate == GEOMETRIC_CLIP:
        # The loss is that of the response's ratio; a clipped token has no share in its gradient.
        own = logprobs - old_logprobs
        clipped = torch.where((A < 0) & (own < -o.eps_low), CLIP_LOW, clipped)
        clipped = torch.where((A > 0) & (own > o.eps_high), CLIP_HIGH, clipped)
        loss = -A * ratio
        g = torch.where(clipped == CLIP_NONE, -A * r, 0.0)
    elif o.surrogate == GAMMA:
        # VESPO (arXiv 2602.10693): w^k exp(lambda (1 - w)), 1 at w = 1
        log_weight = by_sign(A, o.power_low, o.power_high) * clamp_log_ratio(log_ratio.detach())
        g = -A * (log_weight + by_sign(A, o.eps_low, o.eps_high) * (1 - r)).exp()
        loss = torch.where(saturated | (g == 0), 0.0, g * logprobs)
    elif o.surrogate in (QUADRATIC, DYNAMIC_QUADRATIC):
        # SPO (arXiv 2401.16025 eq. 11), and DRPO (arXiv 2606.09821) weighted with q
        pull = A.abs() / by_sign(A, o.eps_low, o.eps_high)
        if o.surrogate == DYNAMIC_QUADRATIC:
            pull = pull * old_logprobs.exp()
        loss = -A * ratio + pull * (ratio - 1).square() / 2
        g = (-A + pull * (r - 1)) * r
    else:
        low, high = clip_bounds(o, old_logprobs)
        taken = ratio
        if o.surrogate == REINFORCE_CLIP:  # UP-GRPO (arXiv 2607.06987): A > 0 against itself
            own = torch.where(saturated, 0.0, logprobs - logprobs.detach()).exp()
            taken = torch.where((A > 0) & ~r.isnan(), own, ratio)
        x = taken.detach()
        if o.surrogate == RATIO_MASK:
            outside = (x < low) | (x > high)
            if masks(o):
                assert divergence is not None
                outside |= divergence > by_sign(A, o.limit_low, o.limit_high)
            clipped = torch.where(outside, CLIP_REGION, clipped)
            value = torch.where(outside, 0.0, taken)
        else:
            # max(-A r, -A clip(r, low, high)), and for A < 0 at most -A cap (DCPO eq. 5; arXiv
            # 1912.09729 eq. 5). From the weakest rule to the strongest.
            clipped = torch.where((A < 0) & (x > o.ratio_cap), CLIP_CAP, clipped)
            clipped = torch.where((A < 0) & (x < low), CLIP_LOW, clipped)
            clipped = torch.where((A > 0) & (x > high), CLIP_HIGH, clipped)
            value = torch.where(clipped == CLIP_CAP, o.ratio_cap, taken)
            value = torch.where(clipped == CLIP_LOW, low, value)
            value = torch.where(clipped == CLIP_HIGH, high, value)
        loss = -A * value
        g = torch.where(clipped == CLIP_NONE, -A * x, 0.0)
    g = torch.where(saturated, 0.0, g)

    if importance_weights is not None and o.surrogate != GAMMA:
        loss = loss * importance_weights
        g = g * importance_weights
    divergence_coef = torch.zeros_like(g)
    if o.score_centering:
        assert divergence is not None
        divergence_coef = A if importance_weights is None else A * importance_weights
        loss = loss + divergence_coef * divergence
    through_ratio = g
    if o.surrogate in (REINFORCE, GAMMA):
        through_ratio = torch.zeros_like(g)
    elif o.surrogate == REINFORCE_CLIP:
        through_ratio = torch.where(A > 0, 0.0, g)
    elif o.surrogate == GEOMETRIC_CLIP:
        through_ratio = torch.where(saturated, 0.0, loss)
    if o.kl_coef != 0:
        assert ref_logprobs is not None
        kl, slope, through = kl_term(o.kl_estimator, logprobs, ref_logprobs, ratio, saturated)
        loss, g = loss + o.kl_coef * kl, g + o.kl_coef * slope
        through_ratio = through_ratio + o.kl_coef * through
    if o.old_kl_coef != 0:
        kl, slope, through = kl_term(o.old_kl_estimator, logprobs, old_logprobs, ratio, saturated)
        loss, g = loss + o.old_kl_coef * kl, g + o.old_kl_coef * slope
        through_ratio = through_ratio + o.old_kl_coef * through
    if o.entropy_coef != 0:
        assert entropy is not None
        loss = loss - o.entropy_coef * entropy
    if o.penalty_coef != 0:
        assert divergence is not None
        excess = divergence - by_sign(A, o.limit_low, o.limit_high)
        loss = loss + o.penalty_coef * excess.relu()
        if is_binary(o):
            slope = binary_slope(o.divergence, logprobs, old_logprobs)
            g = g + torch.where(excess <= 0, 0.0, o.penalty_coef * slope)
        else:
            divergence_coef = torch.where(excess <= 0, 0.0, o.penalty_coef)  # a NaN exceeds
    return Decision(
        loss,
        g.detach(),
        r,
        clipped.to(torch.int8),
        through_ratio.detach(),
        divergence_coef.detach(),
    )
