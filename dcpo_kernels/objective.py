"""What an objective is: a frozen set of numbers, and the rules for which of them go together.

decide.py is the formula that reads them; presets.py has one line per paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

# The place of a name is the code that kernels know it by (csrc/decide.h, kernels/decide.py).
SURROGATES = (
    "clip",
    "dynamic-clip",
    "inverse-sqrt-clip",
    "reinforce",
    "soft-gate",
    "ratio-mask",
)
DIVERGENCES = ("none", "binary_tv", "binary_kl", "topk_tv", "topk_kl", "tv", "kl")
CLIPPED = ("none", "high", "low", "cap", "region")  # which side stopped the token's gradient
RATIO_LEVELS = ("token", "sequence")
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
    """An objective as the kernels take it: two codes and the numbers of `Objective`, by the same
    names."""

    surrogate: int
    divergence: int
    eps_low: float
    eps_high: float
    ratio_max: float
    ratio_cap: float
    limit_low: float
    limit_high: float
    kl_coef: float
    entropy_coef: float
    penalty_coef: float


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` minimizes. Make one with a preset and change parts with
    `dataclasses.replace`.

    surrogate: how the ratio r = exp(logp - old_logp) becomes a loss.
        "clip" clips r to [1 - eps_low, 1 + eps_high]; "dynamic-clip" to DCPO's bounds, which widen
        as the old probability falls; "inverse-sqrt-clip" to 1 -+ eps / sqrt(q); "reinforce" is r,
        held constant, times logp (CISPO, DPPO); "soft-gate" is SAPO's sigmoid, whose temperatures
        are eps_low (A < 0) and eps_high (A > 0); "ratio-mask" is r inside [1 - eps_low, 1 +
        eps_high] and nothing outside (IcePop).
    ratio_max: ceiling of the upper bound (DCPO eq. 6).
    ratio_cap: clip surrogates: with A < 0, the loss is constant beyond it (dual clip); reinforce: r
        is cut there.
    ratio_level: "sequence" takes one ratio per response (GSPO).
    divergence, limit_low, limit_high: DPPO's mask: no gradient where the divergence exceeds
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
    aggregation: str = "token-mean"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    penalty_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("surrogate", SURROGATES),
            ("divergence", DIVERGENCES),
            ("ratio_level", RATIO_LEVELS),
            ("aggregation", AGGREGATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{self.name}: {name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(allowed)}"
                )
        for name in Numbers._fields[2:]:
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{self.name}: {name} must be a number, got {value!r}")
        for name in ("eps_low", "eps_high", "limit_low", "limit_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be >= 0")
        for name in ("ratio_max", "ratio_cap"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be >= 1")
        for name in ("kl_coef", "entropy_coef", "penalty_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be finite")
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
        clips = self.surrogate not in ("reinforce", "soft-gate", "ratio-mask")
        if not clips and self.ratio_max != math.inf:
            raise ValueError(
                f"{self.name}: ratio_max bounds a clip, and surrogate={self.surrogate!r} has none"
            )
        if self.surrogate in ("soft-gate", "ratio-mask") and self.ratio_cap != math.inf:
            raise ValueError(
                f"{self.name}: ratio_cap has no place in surrogate={self.surrogate!r}, which "
                "bounds the ratio itself"
            )
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
    def numbers(self) -> Numbers:
        return Numbers(
            SURROGATES.index(self.surrogate),
            DIVERGENCES.index(self.divergence),
            *(float(getattr(self, name)) for name in Numbers._fields[2:]),
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
