"""--compare: two records of the same rows, each with a verdict."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from dcpo_kernels.bench import stats
from dcpo_kernels.bench.records import Record, Row
from dcpo_kernels.bench.screen import Screen
from dcpo_kernels.bench.table import duration

COLORS = {"FAST": "green", "SLOW": "red", "AMBIGUOUS": "yellow", "SAME": "default"}


def verdicts(new: list[Row], old: list[Row]) -> list[tuple[Row, Row, str]]:
    """(new, old, SAME | FAST | SLOW | AMBIGUOUS) for each row that both have timed."""
    before = {(row.case, row.name): row for row in old if row.seconds}
    pairs = [(row, before.get((row.case, row.name))) for row in new if row.seconds]
    return [
        (row, other, stats.verdict(row.seconds, other.seconds))
        for row, other in pairs
        if other is not None
    ]


def differences(new: Record, old: Record) -> list[str]:
    """What else changed between two records, and may explain a verdict."""

    def facts(record: Record) -> dict[str, Any]:
        environment = record.environment
        gpu = environment.gpu or {}
        return {
            "processor": environment.host.processor,
            "threads": environment.host.threads,
            "instruction set": environment.instruction_set,
            "torch": environment.package["versions"]["torch"],
            "GPU": gpu.get("name"),
            "driver": gpu.get("driver"),
            "variables": environment.variables,
            "cache": record.cache,
        }

    a, b = facts(old), facts(new)
    return [f"{name}: {a[name]} before, {b[name]} now" for name in a if a[name] != b[name]]


def show(screen: Screen, new: Record, old: Record) -> None:
    found = verdicts(new.rows, old.rows)
    screen.say(f"compared with {old.created}:" if found else "compared: no row is in both records")
    for case, group in groupby(found, key=lambda pair: pair[0].case):
        lines = []
        for row, other, verdict in group:
            ratio, low, high = stats.speedup(other.seconds, row.seconds)
            lines.append(
                [
                    row.name + (" !" if row.marks or other.marks else ""),
                    duration(other.seconds.median),
                    duration(row.seconds.median),
                    f"{ratio:.3f} ({low:.3f} - {high:.3f})",
                    verdict,
                ]
            )
        header = ["", "before", "now", "now / before", ""]
        screen.table(case.describe(), header, lines, [COLORS[line[-1]] for line in lines])
    for text in differences(new, old):
        screen.say(f"  ! {text}", "yellow")
