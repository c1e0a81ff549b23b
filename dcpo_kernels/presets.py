"""Objectives by the name of their paper. Each takes any other field of `Objective` by name:
`grpo(kl_coef=0.04)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dcpo_kernels.objective import Objective


def dcpo(
    eps_low: float = 0.16, eps_high: float = 0.2, ratio_max: float = 10.0, **parts: Any
) -> Objective:
    """Dynamic-adaptive clipping with the only-token-mean loss (DCPO, arXiv 2509.02333, eq. 6 and 8,
    appendix A.9).

    The official repository trains with `dcpo(0.2, 0.28, aggregation="token-mean")`.
    """
    objective = Objective(
        "dcpo",
        "dynamic-clip",
        eps_low,
        eps_high,
        ratio_max=ratio_max,
        ratio_cap=ratio_max,
        aggregation="only-token-mean",
    )
    return replace(objective, **parts)


def grpo(eps: float = 0.2, **parts: Any) -> Objective:
    """Symmetric clipping, mean over responses of the mean over tokens (GRPO, arXiv 2402.03300)."""
    objective = Objective("grpo", "clip", eps, eps, aggregation="seq-mean-token-mean")
    return replace(objective, **parts)


def dapo(eps_low: float = 0.2, eps_high: float = 0.28, **parts: Any) -> Objective:
    """Clip-higher with the mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return replace(Objective("dapo", "clip", eps_low, eps_high), **parts)


def ppo(eps: float = 0.2, dual_clip: float = 3.0, **parts: Any) -> Objective:
    """PPO's clipped surrogate with dual clip for A < 0 (arXiv 1707.06347 eq. 7, arXiv 1912.09729
    eq. 5)."""
    return replace(Objective("ppo", "clip", eps, eps, ratio_cap=dual_clip), **parts)


def gspo(eps_low: float = 3e-4, eps_high: float = 4e-4, **parts: Any) -> Objective:
    """One ratio per response, the exponential of its mean log-ratio (GSPO, arXiv 2507.18071, eq. 5
    and 7)."""
    objective = Objective(
        "gspo",
        "clip",
        eps_low,
        eps_high,
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
    )
    return replace(objective, **parts)


def luspo(eps_low: float = 2e-3, eps_high: float = 2.5e-3, **parts: Any) -> Objective:
    """GSPO with each response's loss times its length (LUSPO, arXiv 2602.05261; eps from section
    5.1)."""
    parts = {"name": "luspo", "aggregation": "seq-mean-token-sum", **parts}
    return gspo(eps_low, eps_high, **parts)


def gmpo(eps_low: float = 0.4, eps_high: float = 0.4, **parts: Any) -> Objective:
    """The geometric mean of a response's ratios, each clipped to [exp(-eps_low), exp(eps_high)]
    first (GMPO, arXiv 2507.20673, eq. 5; verl's geo_mean)."""
    objective = Objective(
        "gmpo",
        "geometric-clip",
        eps_low,
        eps_high,
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
    )
    return replace(objective, **parts)


def vespo(
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    **parts: Any,
) -> Objective:
    """log p weighted with w^k exp(lambda (1 - w)), w the product of a response's ratios (VESPO,
    arXiv 2602.10693). `importance_weights` go into the product, as in TRL."""
    objective = Objective(
        "vespo",
        "gamma",
        lambda_neg,
        lambda_pos,
        power_low=k_neg,
        power_high=k_pos,
        ratio_level="sequence",
    )
    return replace(objective, **parts)


def inverse_sqrt(coef: float = 0.2, **parts: Any) -> Objective:
    """Bounds 1 -+ coef / sqrt(q) on the ratio, q the old probability: narrower than DCPO's where q
    is small, for comparison."""
    objective = Objective(
        "inverse_sqrt", "inverse-sqrt-clip", coef, coef, aggregation="only-token-mean"
    )
    return replace(objective, **parts)


def dppo(
    divergence: str = "binary_tv",
    limit: float | Sequence[float] | None = None,
    ratio_cap: float = 20.0,
    **parts: Any,
) -> Objective:
    """A mask where the policy's divergence from the behaviour policy is too large (DPPO, arXiv
    2602.04879).

    limit: one number, or (limit_low, limit_high) for A < 0 and A > 0; 0.15 for total variation and
    0.05 for KL by default. `old_logprobs` are the behaviour policy's (the rollout engine's), as in
    the paper.
    """
    if limit is None:
        limit = 0.05 if divergence.endswith("kl") else 0.15
    limits = list(limit) if isinstance(limit, Sequence) and len(limit) == 2 else [limit, limit]
    objective = Objective(
        "dppo",
        "reinforce",
        divergence=divergence,
        limit_low=limits[0],  # pyright: ignore[reportArgumentType] checked by Objective
        limit_high=limits[1],  # pyright: ignore[reportArgumentType]
        ratio_cap=ratio_cap,
    )
    return replace(objective, **parts)


def cispo(ratio_cap: float = 5.0, ratio_floor: float = 0.0, **parts: Any) -> Objective:
    """The ratio as a constant weight, cut at a floor and a cap, on the log-probability (CISPO,
    arXiv 2506.13585, eq. 4). TRL's epsilon_high is the cap itself, by default 0.2; verl's and
    slime's are 1 - floor and cap - 1."""
    objective = Objective(
        "cispo", "reinforce", ratio_cap=ratio_cap, floor_low=ratio_floor, floor_high=ratio_floor
    )
    return replace(objective, **parts)


def reinforce(**parts: Any) -> Objective:
    """-A logp, whatever the ratio is (GPG, arXiv 2504.02546; with `importance_weights` verl's and
    Tinker's corrected form)."""
    objective = Objective("reinforce", "reinforce", ratio_cap=1.0, floor_low=1.0, floor_high=1.0)
    return replace(objective, **parts)


def topr(**parts: Any) -> Objective:
    """-A logp with A >= 0, and with A < 0 times the ratio, cut at 1 (TOPR, arXiv 2503.14286,
    eq. 8)."""
    return replace(Objective("topr", "reinforce", ratio_cap=1.0, floor_high=1.0), **parts)


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05, **parts: Any) -> Objective:
    """A sigmoid gate in the place of the clip (SAPO, arXiv 2511.20347, eq. 5 to 8): nothing is
    ever clipped, a token fades as its ratio moves away from 1."""
    objective = Objective("sapo", "soft-gate", tau_neg, tau_pos, aggregation="seq-mean-token-mean")
    return replace(objective, **parts)


def icepop(low: float = 0.5, high: float = 5.0, **parts: Any) -> Objective:
    """The plain ratio inside a region, nothing outside it (IcePop's mask on the ratio of the two
    policies; prime-rl's and verl's bounds). `clipped` is 4, region, for tokens outside."""
    return replace(Objective("icepop", "ratio-mask", 1 - low, high - 1), **parts)


def ipo(eps: float = 0.1, tau: float = 1e-3, **parts: Any) -> Objective:
    """The plain ratio where |p - q| <= eps, nothing elsewhere, and tau (log r)^2 against the drift
    (prime-rl's default loss). `clipped` is 4, region, for tokens outside."""
    objective = Objective(
        "ipo",
        "ratio-mask",
        1.0,
        math.inf,
        divergence="binary_tv",
        limit_low=eps,
        limit_high=eps,
        old_kl_coef=2 * tau,
        old_kl_estimator="k2",
    )
    return replace(objective, **parts)


def up(eps_low: float = 0.2, dual_clip: float = 3.0, **parts: Any) -> Objective:
    """-A logp with A > 0; with A < 0 the clip below and PPO's dual clip (UP-GRPO, arXiv
    2607.06987). The loss of a token with A > 0 is -A, its ratio against the policy itself."""
    objective = Objective("up", "reinforce-clip", eps_low, math.inf, ratio_cap=dual_clip)
    return replace(objective, **parts)


def spo(eps: float = 0.2, **parts: Any) -> Objective:
    """A quadratic penalty on the ratio in the place of the clip (Simple Policy Optimization, arXiv
    2401.16025): nothing is ever clipped, and beyond 1 -+ eps the gradient pulls back."""
    return replace(Objective("spo", "quadratic", eps, eps), **parts)


def drpo(eps: float = 12.5, **parts: Any) -> Objective:
    """SPO with its penalty weighted by the old probability (DRPO, arXiv 2606.09821, section 3; eps
    from section 4): rare tokens may move far."""
    return replace(Objective("drpo", "dynamic-quadratic", eps, eps), **parts)


def dr_grpo(eps: float = 0.2, **parts: Any) -> Objective:
    """GRPO without its length bias: token sums over a constant (Dr. GRPO, arXiv 2503.20783, section
    3.2). Goes with `group_advantage(..., normalize=False)`; `policy_loss` needs max_length."""
    return grpo(eps, **{"name": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", **parts})


def bnpo(eps: float = 0.2, **parts: Any) -> Objective:
    """GRPO with the mean over the tokens of a batch, TRL's loss_type="bnpo" (cf. arXiv
    2506.02864)."""
    return grpo(eps, **{"name": "bnpo", "aggregation": "token-mean", **parts})
