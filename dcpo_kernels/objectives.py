"""Objectives: what a token's log-probability is worth, and the gradient that follows from it.

An `Objective` is a frozen set of numbers; `decide` is the formula that reads them, in plain
PyTorch. The Triton and C++ versions (kernels/objective.py, csrc/objective.h) are tested against
this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The order of these names is the code a kernel knows them by (csrc/objective.h,
# kernels/objective.py).
SURROGATES = ("clip", "dynamic-clip", "inverse-sqrt-clip", "reinforce", "soft-gate")
DIVERGENCES = ("none", "binary_tv", "binary_kl", "topk_tv", "topk_kl", "tv", "kl")
RATIO_LEVELS = ("token", "sequence")
AGGREGATIONS = (
    "only-token-mean",
    "seq-mean-token-mean",
    "token-mean",
    "token-sum",
    "seq-mean-token-sum-norm",
)

# `clipped` codes: which side of the trust region stopped the token's gradient.
CLIP_NONE, CLIP_HIGH, CLIP_LOW, CLIP_CAP, CLIP_REGION = range(5)

MAX_LOG_RATIO = 20.0  # |logp - old_logp| and |ref_logp - logp| are held here before exp
MIN_PROB = 1.1754943508222875e-38  # smallest normal float32: q = 0 and denormal q must not give 0/0
MIN_REST = 1e-12  # floor of the probability of whatever is not listed in a divergence
MAX_K = 128


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` minimizes. Make one with a preset and change parts with
    `dataclasses.replace`.

    surrogate: how the ratio r = exp(logp - old_logp) becomes a loss.
        "clip" clips r to [1 - eps_low, 1 + eps_high]; "dynamic-clip" to DCPO's bounds, which widen
        as the old probability falls; "inverse-sqrt-clip" to 1 -+ eps / sqrt(q); "reinforce" is r,
        held constant, times logp (CISPO, DPPO); "soft-gate" is SAPO's sigmoid, whose temperatures
        are eps_low (A < 0) and eps_high (A > 0).
    ratio_max: ceiling of the upper bound (DCPO eq. 6).
    ratio_cap: clip surrogates: with A < 0, the loss is constant beyond it (dual clip); reinforce: r
        is cut there.
    ratio_level: "sequence" takes one ratio per response (GSPO).
    divergence, limit_low, limit_high, k: DPPO's mask: no gradient where the divergence exceeds
        limit_high (A > 0) or limit_low (A < 0) and the token moves further out.
    penalty_coef: not 0: instead of that mask, penalty_coef * max(D - limit, 0) is added to the
        token's loss, with limit_low where A < 0 and limit_high elsewhere. Any surrogate may have
        it. Importance weights don't multiply it.
    """

    name: str
    surrogate: str = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    ratio_max: float = math.inf
    ratio_cap: float = math.inf
    ratio_level: str = "token"
    divergence: str = "none"
    limit_low: float = math.inf
    limit_high: float = math.inf
    k: int = 20
    aggregation: str = "token-mean"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    penalty_coef: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("surrogate", SURROGATES),
            ("divergence", DIVERGENCES),
            ("ratio_level", RATIO_LEVELS),
            ("aggregation", AGGREGATIONS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{self.name}: {field}={getattr(self, field)!r} is not one of "
                    f"{', '.join(allowed)}"
                )
        for field in ("eps_low", "eps_high", "limit_low", "limit_high"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{self.name}: {field}={getattr(self, field)} must be >= 0")
        for field in ("ratio_max", "ratio_cap"):
            if not getattr(self, field) >= 1:
                raise ValueError(f"{self.name}: {field}={getattr(self, field)} must be >= 1")
        for field in ("kl_coef", "entropy_coef", "penalty_coef"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"{self.name}: {field}={getattr(self, field)} must be finite")
        if not 1 <= self.k <= MAX_K:
            raise ValueError(f"{self.name}: k={self.k} must lie in 1..{MAX_K}")
        if self.surrogate == "soft-gate" and not (self.eps_low > 0 and self.eps_high > 0):
            raise ValueError(f"{self.name}: the temperatures of a soft gate must be > 0")
        masks = self.divergence != "none" and self.penalty_coef == 0
        if masks and self.surrogate != "reinforce":
            raise ValueError(
                f"{self.name}: a divergence mask goes with surrogate='reinforce', not "
                f"{self.surrogate!r}: a clipped surrogate already has a trust region; with "
                "penalty_coef the divergence is a penalty instead"
            )
        if self.divergence == "none" and self.penalty_coef != 0:
            raise ValueError(
                f"{self.name}: penalty_coef={self.penalty_coef} needs a divergence to penalize"
            )
        if self.divergence == "none" and (self.limit_low, self.limit_high) != (math.inf, math.inf):
            raise ValueError(f"{self.name}: a limit needs a divergence to be the limit of")
        clips = self.surrogate not in ("reinforce", "soft-gate")
        if not clips and self.ratio_max != math.inf:
            raise ValueError(
                f"{self.name}: ratio_max bounds a clip, and surrogate={self.surrogate!r} has none"
            )
        if self.surrogate == "soft-gate" and self.ratio_cap != math.inf:
            raise ValueError(f"{self.name}: ratio_cap has no place in a soft gate, which saturates")
        if self.ratio_level == "sequence" and self.surrogate in (
            "dynamic-clip",
            "inverse-sqrt-clip",
        ):
            raise ValueError(
                f"{self.name}: surrogate={self.surrogate!r} has bounds per token and "
                f"ratio_level='sequence' one ratio "
                "per response; use surrogate='clip'"
            )
        if self.ratio_level == "sequence" and self.divergence != "none":
            raise ValueError(
                f"{self.name}: divergence={self.divergence!r} compares tokens, "
                f"ratio_level='sequence' responses"
            )

    @property
    def pulls_without_advantage(self) -> bool:
        """Whether a token of advantage 0 may have a gradient."""
        return self.kl_coef != 0 or self.entropy_coef != 0 or self.penalty_coef != 0

    @property
    def needs_topk(self) -> bool:
        return self.divergence in ("topk_tv", "topk_kl")

    @property
    def needs_old_logits(self) -> bool:
        return self.divergence in ("tv", "kl")


def dcpo(
    eps_low: float = 0.16, eps_high: float = 0.2, ratio_max: float = 10.0, **parts: Any
) -> Objective:
    """Dynamic-adaptive clipping with the only-token-mean loss (DCPO, arXiv 2509.02333, eq. 6 and 8,
    appendix A.9).

    The official repository trains with `dcpo(0.2, 0.28, aggregation="token-mean")`.
    """
    return Objective(
        **{
            "name": "dcpo",
            "surrogate": "dynamic-clip",
            "eps_low": eps_low,
            "eps_high": eps_high,
            "ratio_max": ratio_max,
            "ratio_cap": ratio_max,
            "aggregation": "only-token-mean",
            **parts,
        }
    )


def grpo(eps: float = 0.2, **parts: Any) -> Objective:
    """Symmetric clipping, mean over responses of the mean over tokens (GRPO, arXiv 2402.03300)."""
    return Objective(
        **{
            "name": "grpo",
            "eps_low": eps,
            "eps_high": eps,
            "aggregation": "seq-mean-token-mean",
            **parts,
        }
    )


def dapo(eps_low: float = 0.2, eps_high: float = 0.28, **parts: Any) -> Objective:
    """Clip-higher with the mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return Objective(**{"name": "dapo", "eps_low": eps_low, "eps_high": eps_high, **parts})


def ppo(eps: float = 0.2, dual_clip: float = 3.0, **parts: Any) -> Objective:
    """PPO's clipped surrogate with dual clip for A < 0 (arXiv 1707.06347 eq. 7, arXiv 1912.09729
    eq. 5)."""
    return Objective(
        **{"name": "ppo", "eps_low": eps, "eps_high": eps, "ratio_cap": dual_clip, **parts}
    )


def gspo(eps_low: float = 3e-4, eps_high: float = 4e-4, **parts: Any) -> Objective:
    """One ratio per response, the exponential of its mean log-ratio (GSPO, arXiv 2507.18071, eq. 5
    and 7)."""
    return Objective(
        **{
            "name": "gspo",
            "eps_low": eps_low,
            "eps_high": eps_high,
            "ratio_level": "sequence",
            "aggregation": "seq-mean-token-mean",
            **parts,
        }
    )


def inverse_sqrt(coef: float = 0.2, **parts: Any) -> Objective:
    """Bounds 1 -+ coef / sqrt(q) on the ratio, q the old probability."""
    return Objective(
        **{
            "name": "inverse_sqrt",
            "surrogate": "inverse-sqrt-clip",
            "eps_low": coef,
            "eps_high": coef,
            "aggregation": "only-token-mean",
            **parts,
        }
    )


def dppo(
    divergence: str = "binary_tv",
    limit: float | tuple[float, float] | None = None,
    ratio_cap: float = 20.0,
    k: int = 20,
    **parts: Any,
) -> Objective:
    """A mask where the policy's divergence from the behaviour policy is too large (DPPO, arXiv
    2602.04879).

    limit: one number or (limit_low, limit_high) for A < 0 and A > 0; 0.15 for total variation and
    0.05 for KL by default. `old_logprobs` are the behaviour policy's (the rollout engine's), as in
    the paper.
    """
    if limit is None:
        limit = 0.05 if divergence.endswith("kl") else 0.15
    low, high = limit if isinstance(limit, tuple) else (limit, limit)
    return Objective(
        **{
            "name": "dppo",
            "surrogate": "reinforce",
            "eps_low": 0.0,
            "eps_high": 0.0,
            "divergence": divergence,
            "limit_low": low,
            "limit_high": high,
            "ratio_cap": ratio_cap,
            "k": k,
            **parts,
        }
    )


def cispo(ratio_cap: float = 5.0, **parts: Any) -> Objective:
    """The ratio as a constant weight, cut at a cap, on the log-probability (CISPO, arXiv
    2506.13585, eq. 4)."""
    return Objective(
        **{
            "name": "cispo",
            "surrogate": "reinforce",
            "eps_low": 0.0,
            "eps_high": 0.0,
            "ratio_cap": ratio_cap,
            **parts,
        }
    )


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05, **parts: Any) -> Objective:
    """A sigmoid gate in the place of the clip (SAPO, arXiv 2511.20347, eq. 5 to 8): nothing is
    ever clipped, a token fades as its ratio moves away from 1."""
    return Objective(
        **{
            "name": "sapo",
            "surrogate": "soft-gate",
            "eps_low": tau_neg,
            "eps_high": tau_pos,
            "aggregation": "seq-mean-token-mean",
            **parts,
        }
    )


def dr_grpo(eps: float = 0.2, **parts: Any) -> Objective:
    """GRPO without its length bias: token sums over a constant (Dr. GRPO, arXiv 2503.20783, section
    3.2). Goes with `group_advantage(..., normalize=False)`; `policy_loss` needs max_length."""
    return grpo(eps, **{"name": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", **parts})


def bnpo(eps: float = 0.2, **parts: Any) -> Objective:
    """GRPO with the mean over the tokens of a batch, TRL's loss_type="bnpo" (cf. arXiv
    2506.02864)."""
    return grpo(eps, **{"name": "bnpo", "aggregation": "token-mean", **parts})


class Decision(NamedTuple):
    """What an objective says of each token, before any weight. All of the shape of the
    log-probabilities."""

    loss: Tensor  # differentiable in the log-probabilities, the entropy and the divergence
    g: Tensor  # dloss/dlogp; dloss/dH is -entropy_coef, and what a penalty on a top-K or full
    # divergence adds comes through that
    ratio: Tensor
    clipped: Tensor  # int8, CLIP_*


def clip_bounds(objective: Objective, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound on the ratio, of the shape of old_logprobs.

    DCPO eq. 6: |r - 1| r q <= eps solved for r. where/max instead of multiplying by a condition: 4
    eps / q overflows for small q, and inf * 0 is NaN.
    """
    q = old_logprobs.exp().clamp(min=MIN_PROB)
    if objective.surrogate == "dynamic-clip":
        low = 0.5 + 0.5 * (1 - 4 * objective.eps_low / q).clamp(min=0).sqrt()
        high = 0.5 + 0.5 * (1 + 4 * objective.eps_high / q).sqrt()
    elif objective.surrogate == "inverse-sqrt-clip":
        low = (1 - objective.eps_low / q.sqrt()).clamp(min=0)
        high = 1 + objective.eps_high / q.sqrt()
    else:
        low = torch.full_like(q, 1 - objective.eps_low)
        high = torch.full_like(q, 1 + objective.eps_high)
    return low, high.clamp(max=objective.ratio_max)


def hold(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO. Unlike clamp it hands on the gradient of a NaN: where the loss is
    NaN, a gradient of 0 would hide it."""
    x = torch.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
    return torch.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x)


def binary_divergence(kind: str, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Divergence between two policies that are only told apart by the sampled token (DPPO section
    4)."""
    p, q = logprobs.exp(), old_logprobs.exp()
    if kind == "binary_tv":
        return (p - q).abs()
    # 1 - p from expm1: 1 - exp(logp) has no digits left where logp is near 0.
    not_p, not_q = (-torch.expm1(x) for x in (logprobs, old_logprobs))
    inside = torch.where(q > 0, q * (old_logprobs - logprobs), 0.0)
    rest = not_q * (not_q.log() - not_p.clamp(min=MIN_REST).log())
    return inside + torch.where(not_q > 0, rest, 0.0)


def binary_slope(kind: str, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Its derivative in logprobs."""
    p, q = logprobs.exp(), old_logprobs.exp()
    if kind == "binary_tv":
        return (p - q).sign() * p
    not_p, not_q = -torch.expm1(logprobs), -torch.expm1(old_logprobs)
    return torch.where(not_p < MIN_REST, 0.0, not_q * p / not_p) - q


def decide(
    objective: Objective,
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
    x = (
        logprobs - old_logprobs
        if log_ratio is None
        else log_ratio.detach() + torch.where(logprobs.isinf(), 0.0, logprobs - logprobs.detach())
    )
    held = x.abs() > MAX_LOG_RATIO  # there the ratio is a constant; false for NaN
    ratio = hold(x).exp()
    r = ratio.detach()
    clipped = torch.zeros_like(r, dtype=torch.int8)
    if objective.divergence.startswith("binary"):
        divergence = binary_divergence(objective.divergence, logprobs, old_logprobs)

    if objective.surrogate == "soft-gate":
        # SAPO (arXiv 2511.20347): f(r) = 4/tau sigmoid(tau (r - 1)), f'(1) = 1
        tau = torch.where(A > 0, objective.eps_high, objective.eps_low)
        gate = torch.sigmoid(tau * (ratio - 1))
        loss = -A * 4 / tau * gate
        g = -A * 4 * (gate * (1 - gate)).detach() * r
    elif objective.surrogate == "reinforce":
        weight = r.clamp(max=objective.ratio_cap)
        if divergence is None or objective.penalty_coef != 0:
            clipped = torch.where(r > objective.ratio_cap, CLIP_CAP, clipped)
        else:
            distance = divergence.detach()
            moved = logprobs.detach() - old_logprobs
            out = torch.where(
                A > 0,
                (moved > 0) & (distance > objective.limit_high),
                (A < 0) & (moved < 0) & (distance > objective.limit_low),
            )
            clipped = torch.where(out, CLIP_REGION, clipped)
            weight = torch.where(out, 0.0, weight)
        g = -A * weight
        # where, not a product: a weight of 0 on a log-probability of -inf is a loss of 0
        loss = torch.where(held | (g == 0), 0.0, g * logprobs)
    else:
        # max(-A r, -A clip(r, low, high)), and for A < 0 at most -A cap (DCPO eq. 5; arXiv
        # 1912.09729 eq. 5)
        low, high = clip_bounds(objective, old_logprobs)
        value = torch.where((A > 0) & (r > high), high, ratio)
        value = torch.where((A < 0) & (r < low), low, value)
        value = torch.where((A < 0) & (r > objective.ratio_cap), objective.ratio_cap, value)
        clipped = torch.where((A > 0) & (r > high), CLIP_HIGH, clipped)
        clipped = torch.where((A < 0) & (r < low), CLIP_LOW, clipped)
        clipped = torch.where((A < 0) & (r > objective.ratio_cap), CLIP_CAP, clipped)
        loss = -A * value
        g = torch.where(clipped == CLIP_NONE, -A * r, 0.0)
    g = torch.where(held, 0.0, g)

    if importance_weights is not None:
        loss, g = loss * importance_weights, g * importance_weights
    if objective.kl_coef != 0:
        assert ref_logprobs is not None
        # k3 estimator exp(d) - d - 1, d = ref - logp
        d = ref_logprobs - logprobs
        bounded = hold(d)
        loss = loss + objective.kl_coef * (torch.expm1(bounded) - bounded)
        pull = -objective.kl_coef * torch.expm1(bounded.detach())
        g = g + torch.where(d.abs() > MAX_LOG_RATIO, 0.0, pull)
    if objective.entropy_coef != 0:
        assert entropy is not None
        loss = loss - objective.entropy_coef * entropy
    if objective.penalty_coef != 0:
        assert divergence is not None
        excess = divergence - torch.where(A < 0, objective.limit_low, objective.limit_high)
        loss = loss + objective.penalty_coef * excess.relu()
        if objective.divergence.startswith("binary"):
            slope = binary_slope(objective.divergence, logprobs, old_logprobs)
            g = g + torch.where(excess <= 0, 0.0, objective.penalty_coef * slope)
    return Decision(loss, g.detach(), r, clipped.to(torch.int8))


def kernel_arguments(
    objective: Objective,
) -> tuple[int, int, float, float, float, float, float, float, float, float, float]:
    """The objective as the operators take it: two codes and nine numbers (ops/fused.py names
    them)."""
    o = objective
    return (
        SURROGATES.index(o.surrogate),
        DIVERGENCES.index(o.divergence),
        o.eps_low,
        o.eps_high,
        o.ratio_max,
        o.ratio_cap,
        o.limit_low,
        o.limit_high,
        o.kl_coef,
        o.entropy_coef,
        o.penalty_coef,
    )
