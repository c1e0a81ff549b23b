"""From samples, in seconds, to what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcpo_kernels.bench.records import Times

RESAMPLES = 2000
CONFIDENCE = 0.95
BAND = 0.03  # a difference smaller than this is none


def bootstrap_median(samples: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by resampling (percentile method, fixed seed)."""
    x = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    medians = np.median(x[draws], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def summarize(samples: Sequence[float]) -> Times:
    x = np.asarray(samples, dtype=np.float64)
    low, high = bootstrap_median(samples)
    return Times(
        median=float(np.median(x)),
        min=float(x.min()),
        p20=float(np.quantile(x, 0.2)),
        p80=float(np.quantile(x, 0.8)),
        low=low,
        high=high,
        samples=len(x),
    )


class Speedup(NamedTuple):
    ratio: float
    low: float
    high: float

    @property
    def ambiguous(self) -> bool:
        """The intervals of the two medians overlap."""
        return self.low <= 1 <= self.high


def speedup(row: Times, base: Times) -> Speedup:
    """How many times faster `row` is than `base`."""
    return Speedup(base.median / row.median, base.low / row.high, base.high / row.low)


def verdict(new: Times, old: Times) -> str:
    """Of the ratio of two medians, by the interval in which it lies: SAME within BAND of 1, else
    FAST or SLOW if it leaves 1 out, else AMBIGUOUS: too much noise to tell."""
    _, low, high = speedup(old, new)
    if low > 1 / (1 + BAND) and high < 1 + BAND:
        return "SAME"
    if high < 1:
        return "FAST"
    return "SLOW" if low > 1 else "AMBIGUOUS"
