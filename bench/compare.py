"""--compare: two records of the same rows, each with a verdict."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dcpo_kernels.bench import stats
from dcpo_kernels.bench.table import Row, case_of, duration, marks

COLORS = {"FAST": "green", "SLOW": "red", "AMBIGUOUS": "yellow", "SAME": "default"}


def verdicts(new: list[Row], old: list[Row]) -> list[tuple[Row, Row, str]]:
    """(new, old, SAME | FAST | SLOW | AMBIGUOUS) for each row that both have timed."""
    before = {(case_of(row), row["name"]): row for row in old if "seconds" in row}
    found = []
    for row in new:
        other = before.get((case_of(row), row["name"]))
        if other is not None and "seconds" in row:
            found.append((row, other, stats.verdict(row["seconds"], other["seconds"])))
    return found


def differences(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What else changed between two records, and may be what a verdict is about."""

    def facts(record: dict[str, Any]) -> dict[str, Any]:
        environment = record["environment"]
        package, host, gpu = environment["package"], environment["host"], environment["gpu"] or {}
        return {
            "processor": host["processor"],
            "threads": host["threads"],
            "instruction set": package.get("cpu", {}).get("isa"),
            "torch": package["versions"]["torch"],
            "GPU": gpu.get("name"),
            "driver": gpu.get("driver"),
            "variables": environment["variables"],
            "cache": record["cache"],
        }

    a, b = facts(old), facts(new)
    return [f"{name}: {a[name]} before, {b[name]} now" for name in a if a[name] != b[name]]


def show(console: Console, new: dict[str, Any], old: dict[str, Any]) -> None:
    found = verdicts(new["rows"], old["rows"])
    table = Table(title=f"compared with {old['created']}", title_justify="left", show_edge=False)
    for name in ("", "row", "before", "now", "now / before", ""):
        table.add_column(name)
    last = None
    for row, other, verdict in found:
        s, o = row["seconds"], other["seconds"]
        case = case_of(row).describe()
        table.add_row(
            "" if case == last else case,
            row["name"] + (" !" if marks(row) or marks(other) else ""),
            duration(o["median"]),
            duration(s["median"]),
            f"{s['median'] / o['median']:.3f} "
            f"({s['low'] / o['high']:.3f} - {s['high'] / o['low']:.3f})",
            f"[{COLORS[verdict]}]{verdict}[/]",
        )
        last = case
    console.print(table if found else "compared: no row is in both records")
    for text in differences(new, old):
        console.print(f"  [yellow]! {text}[/]")
