"""The README's table and that of docs/performance.md, written from the JSON under bench/results, so
that no number is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

from dcpo_kernels.bench import records, stats, table
from dcpo_kernels.bench.operators import operators
from dcpo_kernels.bench.records import Record, Row
from dcpo_kernels.bench.suites import SHAPES, loss
from dcpo_kernels.bench.table import cases_of, duration, named, size

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"


def result_file(record: Record) -> str:
    """One file per kind of machine: measuring again on the same one replaces it."""
    host, gpu = record.environment.host, record.environment.gpu or {}
    isa = record.environment.instruction_set
    name = gpu.get("name") or f"{host.processor} {isa} {host.threads} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def around_tables(root: Path) -> dict[Path, tuple[str, str]]:
    """The text before and after what is generated, of both files."""
    around = {}
    for path in (root / "README.md", root / "docs" / "performance.md"):
        text = path.read_text() if path.exists() else ""
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            raise records.BadRecord(f"{path} needs one line {BEGIN} and after it one line {END}")
        around[path] = text.split(BEGIN)[0], text.split(END)[1]
    return around


def write(root: Path) -> list[Path]:
    """Fills both files from root/bench/results; returns them."""
    found = [records.load(path) for path in sorted((root / "bench" / "results").glob("*.json"))]
    if not found:
        raise records.BadRecord(f"{root / 'bench' / 'results'} holds no results")
    around = around_tables(root)
    for (path, (before, after)), tables in zip(
        around.items(), (_short(found), _long(found)), strict=True
    ):
        path.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")
    return list(around)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(record: Record) -> str:
    environment = record.environment
    host, gpu, commit = environment.host, environment.gpu, environment.commit
    isa = environment.instruction_set or "no compiled kernels"
    where = f"{host.processor}, {isa}, {host.threads} threads"
    if gpu:
        where = f"{gpu['name']}, driver {gpu['driver']}"
    at = f", commit {commit.hash[:10]}" if commit else ""
    at += " with changes" if commit and commit.modified else ""
    return f"{where}; torch {environment.package['versions']['torch']}; {record.created[:10]}{at}"


def _ratio(row: Row, base: Row | None) -> str:
    """Times faster than base."""
    if base is None or row.kind == "copy":
        return ""
    if row is base:
        return "1"
    s = stats.speedup(row.seconds, base.seconds)
    return "ambiguous" if s.ambiguous else f"{s.ratio:.3g}"


def _name(row: Row) -> str:
    text = f"{row.name} {row.version}".strip()
    return f"**dcpo-kernels {text}**" if row.kind == "ours" else text


def _short(found: list[Record]) -> str:
    """The loss that the package is about, on each machine."""
    parts = []
    for record in found:
        for case, rows in cases_of(record.rows):
            if case.shape not in SHAPES[case.device] or case != loss(*case.shape, case.device):
                continue
            compiled, eager, copy = (named(rows, n) for n in ("torch.compile", "eager", "copy"))
            lines = [
                [
                    _name(row),
                    duration(row.seconds.median),
                    _ratio(row, compiled),
                    _ratio(row, eager),
                    f"{row.seconds.median / copy.seconds.median:.3g}" if copy else "",
                    size(row.extra_bytes),
                ]
                for row in rows
                if row.seconds
            ]
            header = [
                f"DCPO, forward and backward, {case.tokens} x {case.vocab} {case.dtype}",
                *("median", "times faster than torch.compile", "than eager"),
                *("time over a copy's", "peak extra memory"),
            ]
            parts += [
                _markdown(header, lines),
                " ".join([f"{_machine(record)}.", *table.marks_of(rows)]),
            ]
    if not parts:
        raise records.BadRecord("bench/results holds no fused dcpo case for the README")
    parts.append(
        "`dcpo bench --suite readme` measures this and writes it here; spread, other operators and "
        "how it was measured: [docs/performance.md](docs/performance.md)."
    )
    return "\n\n".join(parts)


def _long(found: list[Record]) -> str:
    parts = []
    for record in found:
        environment = record.environment
        parts.append(f"## {_machine(record)}")
        facts = [f"`{record.command}`", f"caches {record.cache}"]
        facts.append(f"load at the start {environment.host.load:.2f}")
        if environment.variables:
            facts.append(f"set: {environment.variables}")
        parts.append("; ".join(facts) + ".")
        absent: dict[str, dict[str, None]] = {}  # name: why, each reason once
        for row in record.rows:
            if row.status == "missing":
                absent.setdefault(row.name, {})[row.note] = None
        if absent:
            reasons = [f"- {name}: {'; '.join(notes)}" for name, notes in absent.items()]
            parts.append("\n".join(["Not timed, everywhere or in some cases:\n", *reasons]))
        for case, rows in cases_of(record.rows):
            title = operators()[case.operator].title if case.operator in operators() else ""
            parts.append(f"### {case.describe()}\n\n{title}")
            parts.append(_full(rows))
            notes = [
                f"{row.name}: {row.note}" for row in rows if row.note and row.status != "missing"
            ]
            parts.append("\n".join(f"- {text}" for text in notes + table.marks_of(rows)))
    return "\n\n".join(filter(None, parts))


def _full(rows: list[Row]) -> str:
    compiled, copy = named(rows, "torch.compile"), named(rows, "copy")
    header = ["", *table.HEADER, "peak extra memory", "x torch.compile", "gradient off by"]
    lines = []
    for row in rows:
        if row.seconds:
            error = row.agreement.gradient_error if row.agreement else None
            lines.append(
                [
                    _name(row),
                    *table.cells(row, copy),
                    size(row.extra_bytes),
                    _ratio(row, compiled),
                    "" if error is None else f"{error:.1e}",
                ]
            )
    return _markdown(header, lines)
