"""Presets' numbers, what an Objective refuses, and the limits of the clip bounds."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from backends import CPU, on_backends
from problems import OBJECTIVES

import dcpo_kernels as dk
from dcpo_kernels.decide import clip_bounds, decide, log_ratio_part
from dcpo_kernels.objective import (
    CLIP_CAP,
    CLIP_HIGH,
    CLIP_LOW,
    CLIP_NONE,
    CLIP_REGION,
    CLIPPED,
    DIVERGENCES,
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    SURROGATES,
    WHOLE_RESPONSE,
)

INF = math.inf
# DESIGN.md section 3 and the papers' own numbers. What is not named is a default of Objective.
PRESETS = {
    "dcpo": (dk.dcpo(), {"surrogate": "dynamic-clip", "eps_low": 0.16, "ratio_max": 10.0,
                         "ratio_cap": 10.0, "aggregation": "only-token-mean"}),
    "grpo": (dk.grpo(), {"aggregation": "seq-mean-token-mean"}),
    "dapo": (dk.dapo(), {"eps_high": 0.28}),
    "gspo": (dk.gspo(), {"eps_low": 3e-4, "eps_high": 4e-4, "ratio_level": "sequence",
                         "aggregation": "seq-mean-token-mean"}),
    "ppo": (dk.ppo(), {"ratio_cap": 3.0}),
    "inverse_sqrt": (dk.inverse_sqrt(), {"surrogate": "inverse-sqrt-clip",
                                         "aggregation": "only-token-mean"}),
    "cispo": (dk.cispo(), {"surrogate": "reinforce", "ratio_cap": 5.0}),
    "reinforce": (dk.reinforce(), {"surrogate": "reinforce", "ratio_cap": 1.0, "floor_low": 1.0,
                                   "floor_high": 1.0}),
    "topr": (dk.topr(), {"surrogate": "reinforce", "ratio_cap": 1.0, "floor_high": 1.0}),
    "ipo": (dk.ipo(), {"surrogate": "ratio-mask", "eps_low": 1.0, "eps_high": INF,
                       "divergence": "binary_tv", "limit_low": 0.1, "limit_high": 0.1,
                       "old_kl_coef": 0.002, "old_kl_estimator": "k2"}),
    "up": (dk.up(), {"surrogate": "reinforce-clip", "eps_high": INF, "ratio_cap": 3.0}),
    "spo": (dk.spo(), {"surrogate": "quadratic"}),
    "drpo": (dk.drpo(), {"surrogate": "dynamic-quadratic", "eps_low": 12.5, "eps_high": 12.5}),
    "luspo": (dk.luspo(), {"eps_low": 2e-3, "eps_high": 2.5e-3, "ratio_level": "sequence",
                           "aggregation": "seq-mean-token-sum"}),
    "gmpo": (dk.gmpo(), {"surrogate": "geometric-clip", "eps_low": 0.4, "eps_high": 0.4,
                         "ratio_level": "sequence", "aggregation": "seq-mean-token-mean"}),
    "vespo": (dk.vespo(), {"surrogate": "gamma", "eps_low": 2.0, "eps_high": 3.0, "power_low": 3.0,
                           "power_high": 2.0, "ratio_level": "sequence"}),
    "icepop": (dk.icepop(), {"surrogate": "ratio-mask", "eps_low": 0.5, "eps_high": 4.0}),
    "sapo": (dk.sapo(), {"surrogate": "soft-gate", "eps_low": 1.05, "eps_high": 1.0,
                         "aggregation": "seq-mean-token-mean"}),
    "dr_grpo": (dk.dr_grpo(), {"aggregation": "seq-mean-token-sum-norm"}),
    "bnpo": (dk.bnpo(), {"aggregation": "token-mean"}),
}  # fmt: skip
DEFAULTS = {
    "surrogate": "clip", "eps_low": 0.2, "eps_high": 0.2, "ratio_max": INF, "ratio_cap": INF,
    "floor_low": 0.0, "floor_high": 0.0, "power_low": 0.0, "power_high": 0.0,
    "ratio_level": "token", "divergence": "none",
    "limit_low": INF, "limit_high": INF, "aggregation": "token-mean",
    "kl_coef": 0.0, "kl_estimator": "k3", "old_kl_coef": 0.0, "old_kl_estimator": "k3",
    "entropy_coef": 0.0, "penalty_coef": 0.0, "function": None,
    "rollout_mode": "none", "rollout_low": 0.0, "rollout_high": INF, "score_centering": False,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    objective, numbers = PRESETS[name]
    assert asdict(objective) == {"name": name, **DEFAULTS, **numbers}


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_dppo(divergence):
    limit = 0.05 if divergence.endswith("kl") else 0.15
    expected = {
        "name": "dppo", **DEFAULTS, "surrogate": "reinforce",
        "divergence": divergence, "limit_low": limit, "limit_high": limit, "ratio_cap": 20.0,
    }  # fmt: skip
    objective = dk.dppo(divergence)
    assert asdict(objective) == expected
    assert objective.needs_topk == divergence.startswith("topk")
    assert objective.needs_old_logits == (divergence in ("tv", "kl"))
    looks = "" if divergence.startswith("binary") else f"divergence={divergence!r}"
    assert objective.beyond_target == looks
    own = dk.dppo(divergence, (0.1, 0.2), 3.0)
    assert (own.limit_low, own.limit_high, own.ratio_cap) == (0.1, 0.2, 3.0)
    assert dk.dppo(divergence, 0.3).limit_low == dk.dppo(divergence, 0.3).limit_high == 0.3


def test_default_divergence_is_binary_tv():
    assert dk.dppo().divergence == "binary_tv"


@pytest.mark.parametrize("make", [v for k, v in vars(dk).items() if k in (*PRESETS, "dppo")])
def test_every_preset_takes_parts_and_is_frozen(make):
    parts = {"aggregation": "token-sum", "kl_coef": 0.1, "entropy_coef": -0.2, "name": "mine"}
    objective = make(**parts)
    assert {key: getattr(objective, key) for key in parts} == parts
    with pytest.raises(FrozenInstanceError):
        objective.eps_low = 1.0
    assert hash(objective) == hash(make(**parts)) and objective != make()
    with pytest.raises(TypeError):
        make(epsilon=0.2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"surrogate": "clipped"}, "surrogate='clipped' is not one of clip, dynamic-clip"),
        ({"divergence": "js"}, "divergence='js' is not one of none, binary_tv"),
        (
            {"ratio_level": "batch"},
            "ratio_level='batch' is not one of token, sequence, ",
        ),
        ({"aggregation": "mean"}, "aggregation='mean' is not one of only-token-mean"),
        ({"eps_low": -0.1}, "eps_low=-0.1 must be >= 0"),
        ({"eps_high": math.nan}, "eps_high=nan must be >= 0"),
        ({"surrogate": "reinforce", "divergence": "tv", "limit_low": -1}, "limit_low=-1 must"),
        ({"ratio_max": 0.9}, "ratio_max=0.9 must be >= 1"),
        ({"ratio_cap": math.nan}, "ratio_cap=nan must be >= 1"),
        (
            {"surrogate": "reinforce", "ratio_cap": 0.9, "floor_high": 1},
            "ratio_cap=0.9 must be >= 1",
        ),
        ({"surrogate": "reinforce", "floor_low": -0.1}, "floor_low=-0.1 must be >= 0"),
        ({"floor_low": 0.1}, "a floor is of the weight of surrogate='reinforce'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is not one of k1, k2, k3, abs"),
        ({"old_kl_estimator": "mse"}, "old_kl_estimator='mse' is not one of k1, k2"),
        ({"kl_coef": INF}, "kl_coef=inf must be finite"),
        ({"old_kl_coef": math.nan}, "old_kl_coef=nan must be finite"),
        ({"surrogate": "gamma"}, "is of a whole response and needs ratio_level='sequence'"),
        (
            {"surrogate": "geometric-clip", "ratio_level": "sequence-token"},
            "needs ratio_level='sequence', not 'sequence-token'",
        ),
        ({"power_low": 1.0}, "a power goes with surrogate='gamma'"),
        *(
            (
                {
                    "surrogate": "gamma",
                    "ratio_level": "sequence",
                    f"{kl}_coef": 0.1,
                    f"{kl}_estimator": "k3_unbiased",
                },
                f"{kl}_estimator='k3_unbiased' takes the plain ratio",
            )
            for kl in ("kl", "old_kl")
        ),
        ({"entropy_coef": math.nan}, "entropy_coef=nan must be finite"),
        ({"penalty_coef": INF}, "penalty_coef=inf must be finite"),
        ({"rollout_high": 2.0}, "need rollout_mode='truncate' or 'mask'"),
        ({"rollout_mode": "mask", "rollout_low": 2, "rollout_high": 1}, "0 <= rollout_low <="),
        ({"score_centering": "on"}, "score_centering='on' is not one of False, True"),
        *(
            ({"score_centering": True, **parts}, f"score_centering goes with .*, not {words}")
            for parts, words in (
                ({}, "'clip', 'none' and 'token'"),
                (
                    {"surrogate": "ratio-mask", "divergence": "binary_tv", "limit_low": 0.1},
                    "'ratio-mask', 'binary_tv' and 'token'",
                ),
                (
                    {"surrogate": "gamma", "ratio_level": "sequence"},
                    "'gamma', 'none' and 'sequence'",
                ),
                (
                    {"surrogate": "reinforce", "ratio_level": "sequence-token"},
                    "'reinforce', 'none' and 'sequence-token'",
                ),
                (
                    {"surrogate": "reinforce", "divergence": "topk_kl", "limit_low": 0.1},
                    "'reinforce', 'topk_kl' and 'token'",
                ),
            )
        ),
        ({"penalty_coef": 0.1}, "penalty_coef=0.1 needs a divergence to penalize"),
        (
            {"ratio_level": "sequence", "divergence": "tv", "penalty_coef": 0.1},
            "divergence='tv' compares tokens",
        ),
        ({"surrogate": "soft-gate", "eps_low": 0.0}, "eps_low=0.0 and eps_high=0.2 must be > 0"),
        ({"surrogate": "quadratic", "eps_high": 0.0}, "surrogate='quadratic', which divides by"),
        ({"divergence": "tv"}, "divergence mask goes with surrogate='reinforce' or 'ratio-mask'"),
        ({"limit_low": 0.1}, "a limit needs a divergence"),
        ({"surrogate": "reinforce", "ratio_max": 5.0}, "ratio_max bounds a clip"),
        (
            {"surrogate": "soft-gate", "ratio_cap": 5.0},
            "ratio_cap has no place in surrogate='soft-gate'",
        ),
        ({"surrogate": "ratio-mask", "ratio_cap": 5.0}, "ratio_cap has no place in"),
        ({"surrogate": "quadratic", "ratio_cap": 5.0}, "ratio_cap has no place in"),
        ({"surrogate": "ratio-mask", "ratio_max": 5.0}, "ratio_max bounds a clip"),
        ({"surrogate": "dynamic-clip", "ratio_level": "sequence"}, "bounds per token"),
        ({"surrogate": "dynamic-quadratic", "ratio_level": "sequence"}, "bounds per token"),
        (
            {"surrogate": "reinforce", "divergence": "tv", "ratio_level": "sequence"},
            "compares tokens",
        ),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=f"mine: .*{words}"):
        dk.Objective("mine", **changes)
    if changes.keys() <= {"aggregation", "kl_coef"}:
        with pytest.raises(ValueError, match=words):
            replace(dk.grpo(), **changes)


def test_numbers_of_an_objective():
    for i, surrogate in enumerate(SURROGATES):
        level = "sequence" if surrogate in WHOLE_RESPONSE else "token"
        assert dk.Objective("x", surrogate, ratio_level=level).numbers.surrogate == i
    for i, divergence in enumerate(DIVERGENCES[1:], 1):
        assert dk.dppo(divergence).numbers.divergence == i
    for i, estimator in enumerate(KL_ESTIMATORS):
        numbers = dk.grpo(kl_estimator=estimator, old_kl_estimator=KL_ESTIMATORS[i - 1]).numbers
        assert numbers.kl_estimator == i == (numbers.old_kl_estimator + 1) % len(KL_ESTIMATORS)
    numbers = dk.Objective("x", "clip", 0.1, 0.2, 3, 4, kl_coef=0.5, entropy_coef=0.6).numbers
    assert numbers[:6] == (0, 0, 2, 2, 0, 0)
    assert numbers[6:16] == (0.1, 0.2, 3, 4, 0, 0, 0, 0, INF, INF)
    assert numbers[16:] == (0.5, 0.0, 0.6, 0.0, 0.0, INF)
    assert [dk.cispo(score_centering=on).numbers.score_centering for on in (False, True)] == [0, 1]
    numbers = dk.dppo("kl", (0.7, 0.8), penalty_coef=0.9).numbers
    assert (numbers.limit_low, numbers.limit_high, numbers.penalty_coef) == (0.7, 0.8, 0.9)
    assert dk.dppo("kl", [0.7, 0.8]) == dk.dppo("kl", (0.7, 0.8))
    assert tuple(range(len(CLIPPED))) == (CLIP_NONE, CLIP_HIGH, CLIP_LOW, CLIP_CAP, CLIP_REGION)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: dk.dcpo("0.2"), "dcpo: eps_low must be a number, got '0.2'"),
        (lambda: dk.grpo(None), "grpo: eps_low must be a number, got None"),
        (lambda: dk.ppo(dual_clip=[3.0]), r"ppo: ratio_cap must be a number, got \[3.0\]"),
        (lambda: dk.dppo(limit=[0.1]), r"dppo: limit_low must be a number, got \[0.1\]"),
        (lambda: dk.dppo(limit=(0.1, 0.2, 0.3)), "dppo: limit_low must be a number"),
        (lambda: dk.dppo(limit="0.1"), "dppo: limit_low must be a number, got '0.1'"),
        (lambda: dk.grpo(kl_coef=True), "grpo: kl_coef must be a number, got True"),
    ],
)
def test_numbers_that_are_none(make, words):
    with pytest.raises(TypeError, match=words):
        make()


# ---- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounds_at_the_ends(dtype):
    old = torch.tensor([0.0, -50.0, -87.4, -100.0, -104.0, -745.0, -1e30, -INF], dtype=dtype)
    low, high = clip_bounds(dk.dcpo().numbers, old)
    exact = (0.5 + 0.5 * math.sqrt(1 - 0.64), 0.5 + 0.5 * math.sqrt(1 + 0.8))
    assert (float(low[0]), float(high[0])) == pytest.approx(exact, rel=1e-6)
    assert (low[1:] == 0.5).all() and (high[1:] == 10).all()  # not NaN, not inf
    low, high = clip_bounds(dk.inverse_sqrt(0.2).numbers, old)
    assert low[0] == pytest.approx(0.8) and high[0] == pytest.approx(1.2)
    assert (low[1:] == 0).all() and high.isfinite().all() and (high[1:] > 1e9).all()
    low, high = clip_bounds(dk.dapo().numbers, old)
    assert (low == 0.8).all() and (high == 1.28).all()


def test_bounds_widen_as_the_old_probability_falls():
    """DCPO eq. 6: |r - 1| r q <= eps solved for r; equality at each bound that is not a limit."""
    old = torch.linspace(-12, 0, 1001, dtype=torch.float64)
    q = old.exp()
    low, high = clip_bounds(dk.dcpo().numbers, old)
    assert (low.diff() >= 0).all() and (high.diff() <= 0).all()
    inside = high < 10
    torch.testing.assert_close(((high - 1) * high * q)[inside], torch.full_like(q[inside], 0.2))
    inside = low > 0.5
    torch.testing.assert_close(((1 - low) * low * q)[inside], torch.full_like(q[inside], 0.16))
    assert inside.any() and not inside.all()


def test_zero_eps_leaves_no_room():
    low, high = clip_bounds(
        dk.dcpo(0.0, 0.0).numbers, torch.tensor([-3.0, -0.1], dtype=torch.float64)
    )
    assert (low == 1).all() and (high == 1).all()


# ---- decide: one formula in Python and in C++ ---------------------------------------------------


def through_a_kernel(objective, logp, old, A, ref, backend):
    """token_loss, ratio, clipped and g: the gradient at the target is g (1 - p)."""
    logits = torch.stack([logp, torch.log(-torch.expm1(logp))], 1).float().requires_grad_()
    out = dk.policy_loss(
        logits, torch.zeros(len(logp), dtype=torch.int64), old, A, lengths=[1] * len(logp),
        objective=replace(objective, aggregation="token-sum"), ref_logprobs=ref, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out, gradient[:, 0].double() / -torch.expm1(logp)


@on_backends(*CPU)
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if not o().beyond_target])
def test_decide_on_a_grid(name, kl_coef, use_backend):
    """Ratios from e^-25 to e^25, past where they are held."""
    steps = torch.tensor([-25, -20.5, -19.5, -5, -1, -0.3, -0.05, 0, 0.05, 0.3, 1, 5, 19.5, 25.0])
    grid = torch.meshgrid(
        torch.tensor([-30.0, -12.0, -3.0, -0.5, -0.01]), steps, torch.tensor([-2.0, 0.0, 1.5]),
        indexing="ij",
    )  # fmt: skip
    logp, step, A = (x.flatten() for x in grid)
    old, ref = logp - step, logp + 0.7 * step
    objective = replace(OBJECTIVES[name](), kl_coef=kl_coef)
    if objective.divergence != "none":  # an old probability is one
        possible = old <= 0
        logp, old, A, ref = (x[possible] for x in (logp, old, A, ref))
    out, g = through_a_kernel(objective, logp.double(), old, A, ref, use_backend)
    doubles = [x.double() for x in (out.logprobs, old, A)]
    # A response of one token each
    log_ratio = log_ratio_part(objective.numbers, *doubles, torch.ones_like(doubles[0]))
    want = decide(objective.numbers, *doubles, ref_logprobs=ref.double(), log_ratio=log_ratio)
    torch.testing.assert_close(out.ratio.double(), want.ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.token_loss.double(), want.loss, rtol=3e-5, atol=1e-6)
    assert torch.equal(out.clipped, want.clipped)
    torch.testing.assert_close(g, want.g, rtol=1e-4, atol=1e-5)
    held = (doubles[0] - old.double()).abs() > MAX_LOG_RATIO
    assert held.any() or objective.divergence != "none"
    if not objective.pulls_without_advantage:
        assert (g[held] == 0).all()
