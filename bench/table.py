"""The table on the screen, from the record alone, and the cells that the README's tables share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from dcpo_kernels.bench import stats
from dcpo_kernels.bench.records import Row, Times
from dcpo_kernels.bench.screen import Screen
from dcpo_kernels.bench.shapes import Case

WIDE = 130  # columns of a screen that has room for everything
HEADER = ["median", "95 % of it", "min", "p20 - p80", "GB/s", "of copy"]


def cases_of(rows: list[Row]) -> list[tuple[Case, list[Row]]]:
    """Rows by the case they were measured in, in order."""
    return [(case, list(group)) for case, group in groupby(rows, key=lambda row: row.case)]


def named(rows: list[Row], name: str) -> Row | None:
    """The row of that name, if it was timed."""
    return next((row for row in rows if row.name == name and row.seconds), None)


def rate(row: Row) -> float:
    """Bytes per second, by the least that the operator has to move."""
    return row.minimum_bytes / row.seconds.median


def cells(row: Row, copy: Row | None) -> list[str]:
    """Of a timed row, under HEADER."""
    s = row.seconds
    return [
        duration(s.median),
        f"{duration(s.low)} - {duration(s.high)}",
        duration(s.min),
        f"{duration(s.p20)} - {duration(s.p80)}",
        f"{rate(row) / 1e9:.1f}",
        f"{rate(row) / rate(copy):.0%}" if copy else "",
    ]


def marks_of(rows: Iterable[Row]) -> list[str]:
    found = {mark for row in rows for mark in row.marks}
    return [f"While this was measured, {mark}." for mark in sorted(found)]


def show(screen: Screen, rows: list[Row], baseline: str) -> None:
    for case, group in cases_of(rows):
        timed = [row for row in group if row.seconds]
        copy, base = named(group, "copy"), named(group, baseline)
        lines = [
            [
                f"{row.name} {row.version}".strip() + (" !" if row.marks else ""),
                *cells(row, copy),
                size(row.extra_bytes or 0),
                faster(row.seconds, base.seconds) if base else "",
            ]
            for row in timed
        ]
        lines.insert(0, ["", *HEADER, "extra memory", f"x {baseline}"])
        if screen.width < WIDE:
            lines = [[*line[:2], *line[5:]] for line in lines]
        screen.table(case.describe(), lines[0], lines[1:])
        for row in group:
            if not row.seconds:
                screen.say(f"  {row.name}: {row.status}: {row.note}", "dim")
            elif row.note:
                screen.say(f"  {row.name}: {row.note}", "dim")
        for text in marks_of(group):
            screen.say(f"  ! {text}", "yellow")
        screen.say("")


def duration(seconds: float) -> str:
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = seconds * scale
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def faster(row: Times, base: Times) -> str:
    """How many times faster, with the interval that makes it believable."""
    if row == base:
        return "1"
    s = stats.speedup(row, base)
    return "AMBIGUOUS" if s.ambiguous else f"{s.ratio:.3g} ({s.low:.3g} - {s.high:.3g})"
