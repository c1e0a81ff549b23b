"""The README's table and docs/performance.md, written from the JSON under bench/results, so that no
number is typed by hand."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcpo_kernels.bench import record as records
from dcpo_kernels.bench import stats
from dcpo_kernels.bench.operators import operators
from dcpo_kernels.bench.shapes import MODELS, Case
from dcpo_kernels.bench.table import Row, cases_of, duration, marks, named, rate, size

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"
SHAPES = {
    "cpu": ((256, MODELS["qwen2.5"]),),
    "cuda": ((4096, MODELS["qwen2.5"]), (8192, MODELS["llama3"])),
}


def suite(device: str) -> list[Case]:
    """What `--suite readme` measures: every operator at each shape, then other dtypes and
    vocabularies at the first."""
    cases = []
    for tokens, vocab in SHAPES[device]:
        of = functools.partial(Case, tokens=tokens, vocab=vocab, dtype="bf16", device=device)
        cases += [
            of("fused", "dcpo"),
            of("fused", "dcpo", zero_advantage=0.5),
            of("fused", "dcpo", masked=0.2),
            of("fused", "grpo"),
            of("fused", "gspo"),
            of("fused", "dppo-topk"),
            of("fused", "dppo-full"),
            of("two_pass", ""),
            of("read", ""),
        ]
    first = cases[0]
    cases.append(replace(first, dtype="fp32"))
    cases += [replace(first, vocab=v) for v in (32000, *MODELS.values()) if v != first.vocab]
    return cases


def result_file(record: dict[str, Any]) -> str:
    """One file a kind of machine: measuring again on the same one replaces it."""
    environment = record["environment"]
    host, gpu = environment["host"], environment["gpu"] or {}
    isa = environment["package"].get("cpu", {}).get("isa", "")
    name = gpu.get("name") or f"{host['processor']} {isa} {host['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def around_table(root: Path) -> tuple[str, str]:
    """The README's text before and after what is generated."""
    path = root / "README.md"
    text = path.read_text() if path.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise records.BadRecord(f"{path} needs one line {BEGIN} and after it one line {END}")
    return text.split(BEGIN)[0], text.split(END)[1]


def write(root: Path) -> list[Path]:
    """Regenerates both files from root/bench/results; returns them."""
    found = [records.load(path) for path in sorted((root / "bench" / "results").glob("*.json"))]
    if not found:
        raise records.BadRecord(f"{root / 'bench' / 'results'} holds no results")
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    before, after = around_table(root)
    readme.write_text(f"{before}{BEGIN}\n{_short(found)}\n{END}{after}")
    performance.parent.mkdir(exist_ok=True)
    performance.write_text(_long(found))
    return [readme, performance]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(record: dict[str, Any]) -> str:
    environment = record["environment"]
    host, gpu, package = environment["host"], environment["gpu"], environment["package"]
    isa = package.get("cpu", {}).get("isa", "no compiled kernels")
    where = f"{host['processor']}, {isa}, {host['threads']} threads"
    if gpu:
        where = f"{gpu['name']}, driver {gpu['driver']}"
    commit = environment["commit"]
    at = "" if commit is None else f", commit {commit['hash'][:10]}"
    at += " with changes" if commit and commit["modified"] else ""
    return f"{where}; torch {package['versions']['torch']}; {record['created'][:10]}{at}"


def _ratio(row: Row, base: Row | None) -> str:
    """Times faster than base."""
    if base is None or row["kind"] == "copy":
        return ""
    if row is base:
        return "1"
    s = stats.speedup(row["seconds"], base["seconds"])
    return "ambiguous" if s["ambiguous"] else f"{s['ratio']:.3g}"


def _marks(rows: list[Row]) -> list[str]:
    found = {mark for row in rows for mark in marks(row)}
    return [f"While this was measured, {mark}." for mark in sorted(found)]


def _name(row: Row) -> str:
    text = f"{row['name']} {row['version']}".strip()
    return f"**dcpo-kernels {text}**" if row["kind"] == "ours" else text


def _short(found: list[dict[str, Any]]) -> str:
    """The loss that the package is about, on each machine."""
    parts = []
    for record in found:
        for case, rows in cases_of(record["rows"]):
            plain = Case("fused", "dcpo", case.tokens, case.vocab, "bf16", case.device)
            if case != plain or (case.tokens, case.vocab) not in SHAPES[case.device]:
                continue
            compiled, eager, copy = (named(rows, n) for n in ("torch.compile", "eager", "copy"))
            lines = [
                [
                    _name(row),
                    duration(row["seconds"]["median"]),
                    _ratio(row, compiled),
                    _ratio(row, eager),
                    f"{row['seconds']['median'] / copy['seconds']['median']:.3g}" if copy else "",
                    size(row["extra_bytes"]),
                ]
                for row in rows
                if "seconds" in row
            ]
            header = [
                f"DCPO, forward and backward, {case.tokens} x {case.vocab} {case.dtype}",
                *("median", "times faster than torch.compile", "than eager"),
                *("time over a copy's", "peak extra memory"),
            ]
            parts += [_markdown(header, lines), " ".join([f"{_machine(record)}.", *_marks(rows)])]
    if not parts:
        raise records.BadRecord("bench/results holds no fused dcpo case for the README")
    parts.append(
        "`dcpo bench --suite readme` measures this and writes it here; spread, other operators and "
        "how it was measured: [docs/performance.md](docs/performance.md)."
    )
    return "\n\n".join(parts)


def _long(found: list[dict[str, Any]]) -> str:
    parts = [_HOW]
    for record in found:
        parts.append(f"## {_machine(record)}")
        facts = [f"`{record['command']}`", f"caches {record['cache']}"]
        facts.append(f"load at the start {record['environment']['host']['load']:.2f}")
        if record["environment"]["variables"]:
            facts.append(f"set: {record['environment']['variables']}")
        parts.append("; ".join(facts) + ".")
        for case, rows in cases_of(record["rows"]):
            title = operators()[case.operator].title if case.operator in operators() else ""
            parts.append(f"### {case.describe()}\n\n{title}")
            parts.append(_full(rows))
            notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
            parts.append("\n".join(f"- {text}" for text in notes + _marks(rows)))
    return "\n\n".join(filter(None, parts)) + "\n"


def _full(rows: list[Row]) -> str:
    compiled, copy = named(rows, "torch.compile"), named(rows, "copy")
    header = [
        *("", "median", "95 % of it", "min", "p20 - p80", "GB/s", "of copy"),
        *("peak extra memory", "x torch.compile", "gradient off by"),
    ]
    lines = []
    for row in rows:
        if "seconds" not in row:
            continue
        s = row["seconds"]
        error = row.get("agreement", {}).get("gradient_error")
        lines.append(
            [
                _name(row),
                duration(s["median"]),
                f"{duration(s['low'])} - {duration(s['high'])}",
                duration(s["min"]),
                f"{duration(s['p20'])} - {duration(s['p80'])}",
                f"{rate(row) / 1e9:.1f}",
                f"{rate(row) / rate(copy):.0%}" if copy else "",
                size(row["extra_bytes"]),
                _ratio(row, compiled),
                "" if error is None else f"{error:.1e}",
            ]
        )
    return _markdown(header, lines)


_HOW = """# Performance

Written by `dcpo bench --suite readme` from the JSON in [bench/results](../bench/results), which
holds every sample. `dcpo bench --help` says how to measure something else.

- **Right first.** Value and gradient of every row agree with the float64 reference in the same run,
  or it is not timed. The last column is the largest error of a gradient entry, relative to the
  entry (or to 1e-4 of the largest in its row): bf16 rounds by up to 3.9e-03.
- **Inputs** like a training step's: peaked rows, targets sampled from them, log-normal response
  lengths, some tokens beyond every clip bound.
- **Time** in turns, one call each a round, each round begun by another. CPU: `perf_counter_ns`
  around one call, caches emptied before it; what a call allocates counts, with the page faults of
  fresh memory, and what it overwrites is put back outside of the timing. GPU: a captured graph that
  rotates over copies of the logits larger than the L2 cache, events around its replays.
- **Median** with its bootstrap 95 % interval; a speedup whose intervals overlap is "ambiguous".
- **GB/s** counts the least traffic the operator can do with (bench/operators), whatever the
  implementation moves; "of copy" compares it with a copy of the logits in the same rounds, into
  memory that is already there.
- **Peak extra memory** is that of torch's tensors beyond the inputs, results included."""
