"""From samples, in seconds, to what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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


def summarize(samples: Sequence[float]) -> dict[str, Any]:
    x = np.asarray(samples, dtype=np.float64)
    low, high = bootstrap_median(samples)
    return {
        "median": float(np.median(x)),
        "min": float(x.min()),
        "p20": float(np.quantile(x, 0.2)),
        "p80": float(np.quantile(x, 0.8)),
        "low": low,
        "high": high,
        "samples": len(x),
    }


def speedup(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """How many times faster `row` is than `base`; ambiguous where their intervals overlap."""
    return {
        "ratio": base["median"] / row["median"],
        "low": base["low"] / row["high"],
        "high": base["high"] / row["low"],
        "ambiguous": row["low"] <= base["high"] and base["low"] <= row["high"],
    }


def verdict(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Of the ratio of two medians, by the interval in which it lies: SAME within BAND of 1, else
    FAST or SLOW if it leaves 1 out, else AMBIGUOUS: too much noise to tell."""
    low, high = new["low"] / old["high"], new["high"] / old["low"]
    if low > 1 / (1 + BAND) and high < 1 + BAND:
        return "SAME"
    if high < 1:
        return "FAST"
    return "SLOW" if low > 1 else "AMBIGUOUS"
