"""The table on the screen, from the record alone."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcpo_kernels.bench import stats
from dcpo_kernels.bench.shapes import Case

Row = dict[str, Any]
WIDE = 130  # columns of a screen that has room for everything


def case_of(row: Row) -> Case:
    return Case(**{field: row[field] for field in Case.__dataclass_fields__})


def cases_of(rows: list[Row]) -> list[tuple[Case, list[Row]]]:
    """Rows by the case they were measured in, in order."""
    return [(case, list(group)) for case, group in groupby(rows, key=case_of)]


def named(rows: list[Row], name: str) -> Row | None:
    """The row of that name, if it was timed."""
    return next((row for row in rows if row["name"] == name and "seconds" in row), None)


def rate(row: Row) -> float:
    """Bytes a second, by the least that the operator has to move."""
    return row["minimum_bytes"] / row["seconds"]["median"]


def show(console: Console, rows: list[Row], baseline: str) -> None:
    for case, group in cases_of(rows):
        console.print(_table(case, group, baseline, wide=console.width >= WIDE))
        for row in group:
            if "seconds" not in row:
                console.print(f"  [dim]{row['name']}: {row['status']}: {escape(row['note'])}[/]")
            elif row["note"]:
                console.print(f"  [dim]{row['name']}: {escape(row['note'])}[/]")
        for mark in sorted({mark for row in group for mark in marks(row)}):
            console.print(f"  [yellow]! while this was measured, {escape(mark)}[/]")
        console.print()


def marks(row: Row) -> list[str]:
    """Why the row's numbers may be worse than the machine can do."""
    return row.get("machine", {}).get("marks", [])


def _table(case: Case, rows: list[Row], baseline: str, wide: bool) -> Table:
    table = Table(title=case.describe(), title_justify="left", title_style="bold", show_edge=False)
    table.add_column("", no_wrap=True)
    names = ["median", "95 % of it", "min", "p20", "p80"] if wide else ["median"]
    for name in (*names, "GB/s", "of copy", "extra memory", f"x {baseline}"):
        table.add_column(name, justify="right", no_wrap=True)
    copy, base = named(rows, "copy"), named(rows, baseline)
    for row in rows:
        if "seconds" not in row:
            continue
        s = row["seconds"]
        spread = [
            f"{duration(s['low'])} - {duration(s['high'])}",
            *(duration(s[key]) for key in ("min", "p20", "p80")),
        ]
        table.add_row(
            f"{row['name']} {row['version']}".strip() + (" !" if marks(row) else ""),
            duration(s["median"]),
            *(spread if wide else []),
            f"{rate(row) / 1e9:.1f}",
            f"{rate(row) / rate(copy):.0%}" if copy else "",
            size(row["extra_bytes"]),
            faster(s, base["seconds"]) if base else "",
        )
    return table


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


def faster(row: dict[str, Any], base: dict[str, Any]) -> str:
    """How many times faster, with the interval that makes it believable."""
    if row == base:
        return "1"
    s = stats.speedup(row, base)
    if s["ambiguous"]:
        return "AMBIGUOUS"
    return f"{s['ratio']:.3g} ({s['low']:.3g} - {s['high']:.3g})"
