"""The numbers of a run in one PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dcpo_kernels.demo.report import Histories
from dcpo_kernels.files import written_whole
from dcpo_kernels.train.clock import PHASES

COLORS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#5c4d7d")  # methods
PALE = ("#fbb4ae", "#b3cde3", "#ccebc5", "#decbe4", "#222222", "#ffe9a8", "#e5d8bd", "#eeeeee")

CURVES = (
    ("reward", "training reward", 1),
    ("heldout_accuracy", "held-out accuracy, sampled, %", 100),
    ("rur", "response utilization ratio (RUR), %", 100),
    ("tcr", "token clipping ratio (TCR), %", 100),
    ("entropy", "entropy, nats per token", 1),
)


def plot(path: str | os.PathLike[str], results: dict[str, Any], histories: Histories) -> None:
    """Reward, held-out accuracy, RUR, TCR, entropy, and where the time of a step goes."""
    histories = {name: history for name, history in histories.items() if history}
    colors = dict(zip(histories, COLORS * len(histories), strict=False))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    for axis, (key, title, scale) in zip(axes.flat, CURVES, strict=False):
        for name, history in histories.items():
            if key == "heldout_accuracy":
                steps, values = _heldout(results, name, history)
                axis.plot(steps, values, "o-", color=colors[name], label=name, ms=4)
                continue
            steps = [line["step"] for line in history]
            values = [scale * line[key] for line in history]
            axis.plot(steps, values, color=colors[name], alpha=0.3, lw=1)
            axis.plot(steps, _smooth(values), color=colors[name], label=name, lw=2)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if histories:
            axis.legend(frameon=False)
    _plot_time(axes.flat[5], results.get("loss_seconds", {}), histories)
    with written_whole(path) as new:
        figure.savefig(new, dpi=110)
    plt.close(figure)


def _heldout(results: dict[str, Any], name: str, history: Sequence[Any]) -> Any:
    """Steps and accuracies: before, now and then on a part of the problems, and after."""
    points = {
        line["step"]: line["heldout_accuracy"] for line in history if "heldout_accuracy" in line
    }
    if "before" in results:
        points = {0: results["before"]["sampled"]["accuracy"], **points}
    if name in results.get("after", {}):
        points[history[-1]["step"]] = results["after"][name]["sampled"]["accuracy"]
    return list(points), [100 * accuracy for accuracy in points.values()]


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _plot_time(axis: Any, costs: dict[str, dict[str, float]], histories: Histories) -> None:
    """Milliseconds per response token by phase: as it ran, and with plain PyTorch's loss."""
    bars: dict[str, dict[str, float]] = {}
    for name, history in histories.items():
        tokens = sum(line["tokens"] for line in history)
        total = {p: sum(line[f"seconds_{p}"] for line in history) for p in (*PHASES, "step")}
        total["other"] = total.pop("step") - sum(total[phase] for phase in PHASES)
        bars[f"{name}\nour op"] = {p: 1e3 * seconds / tokens for p, seconds in total.items()}
        if name in costs:
            plain = 1e3 * costs[name]["plain"]
            bars[f"{name}\nplain"] = {**bars[f"{name}\nour op"], "loss": plain}
    axis.set_title("time of a step, ms per token")
    bottoms = [0.0] * len(bars)
    for phase, color in zip((*PHASES, "other"), PALE, strict=True):
        heights = [phases.get(phase, 0.0) for phases in bars.values()]
        label = phase.replace("_", " ")
        axis.bar(list(bars), heights, bottom=bottoms, color=color, label=label, width=0.65)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    for i, (phases, top) in enumerate(zip(bars.values(), bottoms, strict=True)):
        share = f"loss {100 * phases['loss'] / top:.0f} %"
        axis.text(i, top, share, ha="center", va="bottom", fontsize=9)
    if bars:
        axis.set_ylim(0, 1.45 * max(bottoms))
        axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
