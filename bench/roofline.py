"""--roofline: each row's traffic over a GPU's bandwidth. A lower bound of its time there: a good
kernel comes within a tenth of it, and nothing is said of kernels bound by arithmetic."""

from __future__ import annotations

from dcpo_kernels.bench.records import Row
from dcpo_kernels.bench.screen import Screen
from dcpo_kernels.bench.table import cases_of, duration, size


def show(screen: Screen, rows: list[Row], gigabytes: float) -> None:
    for case, group in cases_of(rows):
        floor = min(row.minimum_bytes for row in group if row.kind != "copy")
        traffic = {row.name: row.traffic_bytes for row in group if row.traffic_bytes}
        lines = [
            [
                name,
                size(moved),
                f"{moved / (case.tokens * case.vocab):.3g}",
                duration(moved / (gigabytes * 1e9)),
                f"{moved / floor:.2f}" if floor else "",
            ]
            for name, moved in {"floor": floor, **traffic}.items()
        ]
        where = case.describe().replace(f" on {case.device}", "")
        screen.table(
            f"{where}: at {gigabytes:g} GB/s, at best",
            ["", "traffic", "bytes per logit", "time", "times the floor"],
            lines,
            ["bold", *[""] * len(traffic)],
        )
