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
    MAX_LOG_RATIO,
    MIN_PROB,
    MIN_REST,
    SURROGATES,
    Numbers,
)

CLIP, DYNAMIC_CLIP, INVERSE_SQRT_CLIP, REINFORCE, SOFT_GATE, RATIO_MASK = range(len(SURROGATES))
NO_DIVERGENCE, BINARY_TV, BINARY_KL, TOPK_TV, TOPK_KL, FULL_TV, FULL_KL = range(len(DIVERGENCES))


class Decision(NamedTuple):
    """What an objective says of each token, before any weight. All of the shape of the
    log-probabilities."""

    loss: Tensor  # differentiable in the log-probabilities, the entropy and the divergence
    g: Tensor  # dloss/dlogp; dloss/dH is -entropy_coef, and a penalty on a top-K or full divergence
    # has its gradient through that
    ratio: Tensor
    clipped: Tensor  # int8, CLIP_*


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


def is_binary(o: Numbers) -> bool:
    return o.divergence in (BINARY_TV, BINARY_KL)


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
    divergence: the token's, where it takes more than the sampled token to know it (top-K, full).
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
        weight = torch.where(r > o.ratio_cap, o.ratio_cap, r)
        if o.divergence == NO_DIVERGENCE or o.penalty_coef != 0:
            clipped = torch.where(r > o.ratio_cap, CLIP_CAP, clipped)
        else:
            assert divergence is not None
            further_up = (A > 0) & (log_ratio > 0) & (divergence > o.limit_high)
            further_down = (A < 0) & (log_ratio < 0) & (divergence > o.limit_low)
            clipped = torch.where(further_up | further_down, CLIP_REGION, clipped)
            weight = torch.where(further_up | further_down, 0.0, weight)
        g = -A * weight
        # not a product: a weight of 0 on a log-probability of -inf is a loss of 0
        loss = torch.where(saturated | (g == 0), 0.0, g * logprobs)
    else:
        low, high = clip_bounds(o, old_logprobs)
        if o.surrogate == RATIO_MASK:
            clipped = torch.where((r < low) | (r > high), CLIP_REGION, clipped)
            value = torch.where(clipped == CLIP_REGION, 0.0, ratio)
        else:
            # max(-A r, -A clip(r, low, high)), and for A < 0 at most -A cap (DCPO eq. 5; arXiv
            # 1912.09729 eq. 5). From the weakest rule to the strongest.
            clipped = torch.where((A < 0) & (r > o.ratio_cap), CLIP_CAP, clipped)
            clipped = torch.where((A < 0) & (r < low), CLIP_LOW, clipped)
            clipped = torch.where((A > 0) & (r > high), CLIP_HIGH, clipped)
            value = torch.where(clipped == CLIP_CAP, o.ratio_cap, ratio)
            value = torch.where(clipped == CLIP_LOW, low, value)
            value = torch.where(clipped == CLIP_HIGH, high, value)
        loss = -A * value
        g = torch.where(clipped == CLIP_NONE, -A * r, 0.0)
    g = torch.where(saturated, 0.0, g)

    if importance_weights is not None:
        loss = loss * importance_weights
        g = g * importance_weights
    if o.kl_coef != 0:
        assert ref_logprobs is not None
        # k3 estimator exp(d) - d - 1, d = ref - logp
        d = ref_logprobs - logprobs
        bounded = clamp_log_ratio(d)
        loss = loss + o.kl_coef * (torch.expm1(bounded) - bounded)
        slope = -o.kl_coef * torch.expm1(bounded.detach())
        g = g + torch.where(d.abs() > MAX_LOG_RATIO, 0.0, slope)
    if o.entropy_coef != 0:
        assert entropy is not None
        loss = loss - o.entropy_coef * entropy
    if o.penalty_coef != 0:
        assert divergence is not None
        excess = divergence - torch.where(A < 0, o.limit_low, o.limit_high)
        loss = loss + o.penalty_coef * excess.relu()
        if is_binary(o):
            slope = binary_slope(o.divergence, logprobs, old_logprobs)
            g = g + torch.where(excess <= 0, 0.0, o.penalty_coef * slope)
    return Decision(loss, g.detach(), r, clipped.to(torch.int8))
