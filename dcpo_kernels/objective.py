"""What an objective is: a frozen set of numbers, and the rules for which of them go together.

decide.py is the formula that reads them; presets.py has one line per paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

# The place of a name is the code that kernels know it by (csrc/decide.h, kernels/decide.py).
SURROGATES = (
    "clip",
    "dynamic-clip",
    "inverse-sqrt-clip",
    "reinforce-clip",
    "reinforce",
    "soft-gate",
    "ratio-mask",
    "quadratic",
    "dynamic-quadratic",
    "geometric-clip",
    "gamma",
)
WHOLE_RESPONSE = ("geometric-clip", "gamma")
DIVERGENCES = ("none", "binary_tv", "binary_kl", "topk_tv", "topk_kl", "tv", "kl")
ROLLOUT_MODES = ("none", "truncate", "mask")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k3+", "k3_unbiased")
CLIPPED = ("none", "high", "low", "cap", "region")  # which side stopped the token's gradient
RATIO_LEVELS = ("token", "sequence", "sequence-token")
AGGREGATIONS = (
    "only-token-mean",
    "seq-mean-token-mean",
    "token-mean",
    "token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-sum",
)

CLIP_NONE, CLIP_HIGH, CLIP_LOW, CLIP_CAP, CLIP_REGION = range(len(CLIPPED))

MAX_LOG_RATIO = 20.0  # |logp - old_logp| and |ref_logp - logp| are clamped to it before exp
MIN_PROB = 1.1754943508222875e-38  # smallest normal float32: q = 0 and denormal q must not give 0/0
MIN_REST = 1e-12  # floor of the probability of whatever is not listed in a divergence
MAX_K = 128  # ids per row of a top-K divergence


class Numbers(NamedTuple):
    """An objective as the kernels take it: codes first, then the numbers of `Objective`, by the
    same names."""

    surrogate: int
    divergence: int
    kl_estimator: int
    old_kl_estimator: int
    rollout_mode: int
    eps_low: float
    eps_high: float
    ratio_max: float
    ratio_cap: float
    floor_low: float
    floor_high: float
    power_low: float
    power_high: float
    limit_low: float
    limit_high: float
    kl_coef: float
    old_kl_coef: float
    entropy_coef: float
    penalty_coef: float
    rollout_low: float
    rollout_high: float


_CODES = {
    "surrogate": SURROGATES,
    "divergence": DIVERGENCES,
    "kl_estimator": KL_ESTIMATORS,
    "old_kl_estimator": KL_ESTIMATORS,
    "rollout_mode": ROLLOUT_MODES,
}
_NUMBERS = Numbers._fields[len(_CODES) :]


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` minimizes. Make one with a preset and change parts with
    `dataclasses.replace`.

    surrogate: how the ratio r = exp(logp - old_logp) becomes a loss.
        "clip" clips r to [1 - eps_low, 1 + eps_high]; "dynamic-clip" to DCPO's bounds, which widen
        as the old probability falls; "inverse-sqrt-clip" to 1 -+ eps / sqrt(q); "reinforce-clip" is
        -A logp with A > 0 and "clip" else (UP-GRPO); "reinforce" is r, held constant and cut to
        [floor, ratio_cap], times logp (CISPO, DPPO, TOPR); "soft-gate" is SAPO's sigmoid, whose
        temperatures are eps_low and eps_high; "ratio-mask" is r inside [1 - eps_low, 1 + eps_high]
        and within the limits of a divergence, nothing outside (IcePop, IPO); "quadratic" is r with
        |A| (r - 1)^2 / (2 eps) against it (SPO), "dynamic-quadratic" with q times that (DRPO).
        With one ratio per response alone: "geometric-clip" clips the log-ratio of each token to
        [-eps_low, eps_high] before their mean (GMPO); "gamma" is r^power exp(eps (1 - r)), held
        constant, times logp, r the product of the response's ratios and importance weights (VESPO).
        What ends in _low is for A < 0, what ends in _high for the others.
    ratio_max: ceiling of the upper bound (DCPO eq. 6).
    ratio_cap: clip surrogates: with A < 0, the loss is constant beyond it (dual clip; TRL's delta,
        which it calls two-sided, is the same); reinforce: r is cut there.
    ratio_level: "sequence" takes one ratio per response, exp of the mean log-ratio (GSPO). Its
        gradient is that of the mean: all tokens have an equal share of what pulls at the ratio.
        With "sequence-token" each token has its own (GSPO eq. 14, verl), which is the same where a
        response has one advantage and one importance weight.
    divergence, limit_low, limit_high: DPPO's mask: no gradient where the divergence exceeds
        limit_high (A > 0) or limit_low (A < 0) and the token moves further out. With "ratio-mask",
        wherever it exceeds the limit.
    penalty_coef: not 0: instead of that mask, penalty_coef * max(D - limit, 0) is added to the
        token's loss, with limit_low where A < 0 and limit_high elsewhere. Any surrogate may have
        it. Importance weights don't multiply it.
    kl_coef, kl_estimator: of an estimate of KL(policy || reference) that is added to the token's
        loss; old_kl_coef, old_kl_estimator: of KL(policy || old policy). With x = logp - the
        other's: "k1" is x, "k2" x^2 / 2, "k3" exp(-x) - 1 + x, "abs" |x|, "k3+" k3 with the
        gradient of k2 (verl), "k3_unbiased" r times k3, with the gradient of both (DeepSeek-V3.2,
        TRL's default).
    rollout_mode, rollout_low, rollout_high: what is made of w = q / the probability by the engine
        that sampled (`rollout_logprobs`), which multiplies the policy term: "truncate" cuts it to
        the range, "mask" makes it 0 outside.
    function: the token's loss in the place of everything here but the aggregation, from
        `TokenValues`.
    """

    name: str
    surrogate: str = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    ratio_max: float = math.inf
    ratio_cap: float = math.inf
    floor_low: float = 0.0
    floor_high: float = 0.0
    power_low: float = 0.0
    power_high: float = 0.0
    ratio_level: str = "token"
    divergence: str = "none"
    limit_low: float = math.inf
    limit_high: float = math.inf
    aggregation: str = "token-mean"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    old_kl_coef: float = 0.0
    old_kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    penalty_coef: float = 0.0
    rollout_mode: str = "none"
    rollout_low: float = 0.0
    rollout_high: float = math.inf
    function: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        choices = {**_CODES, "ratio_level": RATIO_LEVELS, "aggregation": AGGREGATIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{self.name}: {name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(allowed)}"
                )
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{self.name}: {name} must be a number, got {value!r}")
        weighs = self.surrogate == "reinforce"
        least = {"ratio_max": 1, "ratio_cap": max(self.floor_low, self.floor_high) if weighs else 1}
        for name in ("eps", "limit", "floor", "power"):
            least |= {f"{name}_low": 0, f"{name}_high": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be >= {bound}")
        for name in ("kl_coef", "old_kl_coef", "entropy_coef", "penalty_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be finite")
        if not weighs and (self.floor_low, self.floor_high) != (0, 0):
            raise ValueError(
                f"{self.name}: a floor is of the weight of surrogate='reinforce', and "
                f"surrogate={self.surrogate!r} has none"
            )
        if self.surrogate != "gamma" and (self.power_low, self.power_high) != (0, 0):
            raise ValueError(f"{self.name}: a power goes with surrogate='gamma'")
        divides = ("soft-gate", "quadratic", "dynamic-quadratic")
        if self.surrogate in divides and not (self.eps_low > 0 and self.eps_high > 0):
            raise ValueError(
                f"{self.name}: eps_low={self.eps_low} and eps_high={self.eps_high} must be > 0 for "
                f"surrogate={self.surrogate!r}, which divides by them"
            )
        masks = self.divergence != "none" and self.penalty_coef == 0
        if masks and self.surrogate not in ("reinforce", "ratio-mask"):
            raise ValueError(
                f"{self.name}: a divergence mask goes with surrogate='reinforce' or 'ratio-mask', "
                f"not {self.surrogate!r}: a clipped surrogate already has a trust region; with "
                "penalty_coef the divergence is a penalty instead"
            )
        if self.divergence == "none" and self.penalty_coef != 0:
            raise ValueError(
                f"{self.name}: penalty_coef={self.penalty_coef} needs a divergence to penalize"
            )
        if self.divergence == "none" and (self.limit_low, self.limit_high) != (math.inf, math.inf):
            raise ValueError(f"{self.name}: a limit needs a divergence to be the limit of")
        clips = self.surrogate.endswith("clip") and self.surrogate != "geometric-clip"
        if not clips and self.ratio_max != math.inf:
            raise ValueError(
                f"{self.name}: ratio_max bounds a clip, and surrogate={self.surrogate!r} has none"
            )
        if not clips and not weighs and self.ratio_cap != math.inf:
            raise ValueError(
                f"{self.name}: ratio_cap has no place in surrogate={self.surrogate!r}, which "
                "bounds the ratio itself"
            )
        if self.surrogate in WHOLE_RESPONSE and self.ratio_level != "sequence":
            raise ValueError(
                f"{self.name}: surrogate={self.surrogate!r} is of a whole response and needs "
                f"ratio_level='sequence', not {self.ratio_level!r}"
            )
        for kl in ("kl", "old_kl"):
            unbiased = getattr(self, f"{kl}_estimator") == "k3_unbiased"
            if self.surrogate in WHOLE_RESPONSE and unbiased and getattr(self, f"{kl}_coef") != 0:
                raise ValueError(
                    f"{self.name}: {kl}_estimator='k3_unbiased' takes the plain ratio, which "
                    f"surrogate={self.surrogate!r} doesn't have; use 'k3'"
                )
        if self.by_response and self.surrogate in (
            "dynamic-clip",
            "inverse-sqrt-clip",
            "dynamic-quadratic",
        ):
            raise ValueError(
                f"{self.name}: surrogate={self.surrogate!r} has bounds per token and "
                f"ratio_level={self.ratio_level!r} one ratio per response; use surrogate='clip' "
                "or 'quadratic'"
            )
        if self.by_response and self.divergence != "none":
            raise ValueError(
                f"{self.name}: divergence={self.divergence!r} compares tokens, "
                f"ratio_level={self.ratio_level!r} responses"
            )

        if not 0 <= self.rollout_low <= self.rollout_high:
            raise ValueError(
                f"{self.name}: rollout_low={self.rollout_low} and rollout_high={self.rollout_high} "
                "must be 0 <= rollout_low <= rollout_high"
            )
        if self.rollout_mode == "none" and (self.rollout_low, self.rollout_high) != (0, math.inf):
            raise ValueError(
                f"{self.name}: rollout_low and rollout_high need rollout_mode='truncate' or 'mask'"
            )
        if self.function is not None and replace(self, function=None) != Objective(
            self.name, aggregation=self.aggregation
        ):
            raise ValueError(
                f"{self.name}: a function is the whole loss of a token: with it an objective has "
                "an aggregation and nothing else"
            )

    @property
    def by_response(self) -> bool:
        """Whether the tokens of a response have one ratio."""
        return self.ratio_level != "token"

    @property
    def numbers(self) -> Numbers:
        return Numbers(
            *(names.index(getattr(self, field)) for field, names in _CODES.items()),
            *(float(getattr(self, name)) for name in _NUMBERS),
        )

    @property
    def pulls_without_advantage(self) -> bool:
        """Whether a token of advantage 0 may have a gradient."""
        terms = (self.kl_coef, self.old_kl_coef, self.entropy_coef, self.penalty_coef)
        return self.function is not None or any(coefficient != 0 for coefficient in terms)

    @property
    def needs_topk(self) -> bool:
        return self.divergence in ("topk_tv", "topk_kl")

    @property
    def needs_old_logits(self) -> bool:
        return self.divergence in ("tv", "kl")
