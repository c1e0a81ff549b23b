"""Statistics of samples in seconds, and verdicts on two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcpo_kernels.bench.records import Times

RESAMPLES = 2000
CONFIDENCE = 0.95
BAND = 0.03  # a smaller difference counts as none


def bootstrap_median(samples: Sequence[float]) -> list[float]:
    """95 % interval of the median, by resampling (percentile method, fixed seed)."""
    x = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.median(x[draws], axis=1), [tail, 1 - tail]).tolist()


def summarize(samples: Sequence[float]) -> Times:
    least, p20, median, p80 = np.quantile(samples, [0, 0.2, 0.5, 0.8]).tolist()
    low, high = bootstrap_median(samples)
    n = len(samples)
    return Times(median=median, min=least, p20=p20, p80=p80, low=low, high=high, samples=n)


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
    """By the interval of the ratio of two medians: SAME if it lies within BAND of 1, FAST or SLOW
    if it excludes 1, else AMBIGUOUS: too much noise to tell."""
    _, low, high = speedup(old, new)
    if low > 1 / (1 + BAND) and high < 1 + BAND:
        return "SAME"
    if high < 1:
        return "FAST"
    return "SLOW" if low > 1 else "AMBIGUOUS"
