"""--roofline: each row's traffic over a GPU's bandwidth. A lower bound of its time there: a good
kernel comes within a tenth of it, and nothing is said of kernels bound by arithmetic."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dcpo_kernels.bench.table import cases_of, duration, size


def show(console: Console, rows: list[dict[str, Any]], gigabytes: float) -> None:
    for case, group in cases_of(rows):
        where = case.describe().replace(f" on {case.device}", "")
        table = Table(
            title=f"{where}: at {gigabytes:g} GB/s, at best", title_justify="left", show_edge=False
        )
        table.add_column("")
        for name in ("traffic", "bytes a logit", "time", "times the floor"):
            table.add_column(name, justify="right")
        floor = min(r["minimum_bytes"] for r in group if r["kind"] != "copy")
        table.add_row("floor", *_cells(floor, floor, group[0], gigabytes), style="bold")
        for row in group:
            if row.get("traffic_bytes"):
                table.add_row(row["name"], *_cells(row["traffic_bytes"], floor, row, gigabytes))
        console.print(table)


def _cells(traffic: int, floor: int, row: dict[str, Any], gigabytes: float) -> list[str]:
    return [
        size(traffic),
        f"{traffic / (row['tokens'] * row['vocab']):.3g}",
        duration(traffic / (gigabytes * 1e9)),
        f"{traffic / floor:.2f}" if floor else "",
    ]
