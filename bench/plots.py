"""--plot: pictures of a record, as PNG."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dcpo_kernels.bench import stats
from dcpo_kernels.bench.records import Row
from dcpo_kernels.bench.table import cases_of, named, rate, size

PANELS = 6  # cases in a picture of bars; more are unreadable


def draw(rows: list[Row], baseline: str, folder: Path) -> list[Path]:
    """The pictures that these rows can fill."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.seconds]
    names = list(dict.fromkeys(row.name for row in timed))
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    drawn = [
        _lines(timed, colors, "vocab", folder / "bandwidth.png"),
        _lines(timed, colors, "tokens", folder / "time.png"),
        _bars(timed, colors, folder / "speedup.png", f"times faster than {baseline}", baseline),
        _bars(timed, colors, folder / "memory.png", "peak extra memory, MB", None),
    ]
    plt.close("all")
    return [path for path in drawn if path is not None]


def _lines(rows: list[Row], colors: dict[str, str], along: str, path: Path) -> Path | None:
    """Bandwidth against the vocabulary with the copy as ceiling, or time against tokens, from the
    largest family of cases that differ in nothing else."""
    families: dict[object, list[Row]] = {}
    for row in rows:
        families.setdefault(replace(row.case, **{along: 0}), []).append(row)

    def weight(family: list[Row]) -> tuple[int, int]:
        points = {row.tokens * row.vocab for row in family}
        return len(points), max(points)

    family = max(families.values(), key=weight, default=[])
    if len({getattr(row, along) for row in family}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, color in colors.items():
        points = sorted((row for row in family if row.name == name), key=attrgetter(along))
        if not points:
            continue
        x = [getattr(row, along) for row in points]
        style = {"color": "black", "linestyle": "--"} if name == "copy" else {"color": color}
        label = "copy: the ceiling" if name == "copy" and along == "vocab" else name
        if along == "vocab":
            axes.plot(x, [rate(row) / 1e9 for row in points], marker="o", label=label, **style)
        else:
            s = [row.seconds for row in points]
            axes.plot(x, [1e3 * t.median for t in s], marker="o", label=label, **style)
            low, high = [1e3 * t.p20 for t in s], [1e3 * t.p80 for t in s]
            axes.fill_between(x, low, high, alpha=0.2, color=style["color"])
    title = replace(family[0].case, **{along: -1}).describe()
    axes.set_title(title.replace("-1", "V" if along == "vocab" else "N"))
    axes.set_xlabel("vocabulary" if along == "vocab" else "tokens")
    axes.set_ylabel("GB/s of the least traffic" if along == "vocab" else "ms, p20 to p80 shaded")
    if along == "vocab":
        axes.set_ylim(bottom=0)
    else:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def _bars(
    rows: list[Row], colors: dict[str, str], path: Path, label: str, baseline: str | None
) -> Path | None:
    """One panel per case."""
    groups = [(case, group) for case, group in cases_of(rows)][:PANELS]
    if baseline is not None:
        groups = [(case, group) for case, group in groups if named(group, baseline)]
    if not groups:
        return None
    height = sum(0.35 * len(group) + 0.9 for _, group in groups)
    figure, all_axes = plt.subplots(
        len(groups),
        1,
        figsize=(8, height + 0.5),
        squeeze=False,
        layout="constrained",
        height_ratios=[len(group) + 2 for _, group in groups],
    )
    for axes, (case, group) in zip(all_axes[:, 0], groups, strict=True):
        base = named(group, baseline) if baseline else None
        for row in group:
            if row.kind == "copy":
                continue
            length, text, spread = row.extra_bytes / 1e6, size(row.extra_bytes), None
            if base:
                length, low, high = stats.speedup(row.seconds, base.seconds)
                text, spread = f"{length:.2f}", [[length - low], [high - length]]
            bar = axes.barh(row.name, length, xerr=spread, capsize=3, color=colors[row.name])
            axes.bar_label(bar, [text], padding=4)
        if base:
            axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(case.describe(), fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.15)
    all_axes[-1, 0].set_xlabel(label)
    figure.savefig(path, dpi=150)
    return path
