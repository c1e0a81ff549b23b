"""The final table, from what was measured and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from dcpo_kernels.train.step import Metrics

Histories = dict[str, list[Metrics]]


class Value(NamedTuple):
    middle: float
    error: float = 0.0  # standard error


class Row(NamedTuple):
    label: str
    before: Value | None
    after: dict[str, Value]  # by method
    style: str  # percent, number
    better: str  # "higher", "lower", or "" where neither is


def mean_over_steps(history: Sequence[Metrics], key: str) -> Value:
    values = [line[key] for line in history]
    middle = sum(values) / len(values)
    spread = sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1)
    return Value(middle, math.sqrt(spread / len(values)))


def loss_shares(
    history: Sequence[Metrics], seconds_per_token: dict[str, float]
) -> dict[str, float]:
    """Share of the step spent from hidden states to the loss and its gradients: as it ran, and with
    plain PyTorch in its place."""
    step = sum(line["seconds_step"] for line in history)
    tokens = sum(line["tokens"] for line in history)
    ours, plain = (seconds_per_token[way] * tokens for way in ("ours", "plain"))
    return {"ours": ours / step, "plain": plain / (step - ours + plain)}


def make_rows(results: dict[str, Any], histories: Histories) -> list[Row]:
    """Every number of the table that there is."""
    before, after, costs = (results.get(x, {}) for x in ("before", "after", "loss_seconds"))
    histories = {name: history for name, history in histories.items() if history}
    rows: list[Row] = []

    def evaluated(label: str, kind: str, key: str, better: str) -> None:
        def value(e: dict[str, Any]) -> Value:
            return Value(e[kind][key], e[kind]["error"] if key == "accuracy" else 0.0)

        if before:
            done = {name: value(e) for name, e in after.items()}
            style = "percent" if key != "response_length" else "number"
            rows.append(Row(label, value(before), done, style, better))

    def trained(label: str, key: str, style: str, better: str) -> None:
        if histories:
            values = {name: mean_over_steps(history, key) for name, history in histories.items()}
            rows.append(Row(label, None, values, style, better))

    k = results["options"]["samples"]
    evaluated("held-out accuracy, greedy (Avg@1)", "greedy", "accuracy", "higher")
    evaluated(f"held-out accuracy, sampled (Avg@{k})", "sampled", "accuracy", "higher")
    evaluated("held-out answers without \\boxed{}", "sampled", "unformatted", "")
    evaluated("held-out response length, tokens", "sampled", "response_length", "")
    trained("RUR, mean over the run", "rur", "percent", "higher")
    trained("TCR, mean over the run", "tcr", "percent", "lower")
    if histories:
        start = Value(next(iter(histories.values()))[0]["entropy"])
        end = {name: mean_over_steps(h[-5:], "entropy") for name, h in histories.items()}
        rows.append(Row("entropy, last 5 steps, nats", start, end, "number", ""))
    trained("response tokens per second, whole step", "tokens_per_second", "number", "")
    shared = {n: loss_shares(h, costs[n]) for n, h in histories.items() if n in costs}
    if shared:
        for way, label in (("ours", "our op"), ("plain", "plain PyTorch")):
            values = {name: Value(share[way]) for name, share in shared.items()}
            label = f"share of the step in head and loss, {label}"
            rows.append(Row(label, None, values, "percent", ""))
        for way, label in (
            ("ours", "from hidden states"),
            ("every_row", "the same, A = 0 not skipped"),
            ("logits", "our op on logits"),
            ("plain", "plain PyTorch"),
        ):
            values = {name: Value(1e6 * costs[name][way]) for name in shared}
            label = f"head, loss, gradients, us per token, {label}"
            rows.append(Row(label, None, values, "number", ""))
    return rows


def leader(row: Row) -> str:
    """Who is ahead by more than two standard errors, or "even"; "" where nothing can be won."""
    if not row.better or len(row.after) < 2:
        return ""
    sign = 1 if row.better == "higher" else -1
    (name, first), (_, second), *_ = sorted(
        row.after.items(), key=lambda item: -sign * item[1].middle
    )
    noise = 2 * math.hypot(first.error, second.error)
    return name if abs(first.middle - second.middle) > noise else "even"


def _text(value: Value | None, style: str) -> str:
    if value is None:
        return ""
    if style == "percent":
        middle = f"{100 * value.middle:.1f}"
        return f"{middle} ± {100 * value.error:.1f} %" if value.error else f"{middle} %"
    return f"{value.middle:.0f}" if abs(value.middle) >= 100 else f"{value.middle:.3g}"


def make_table(rows: Sequence[Row], methods: Sequence[str]) -> Table:
    table = Table()
    table.add_column("")
    for name in ("before", *methods, *(["ahead"] if len(methods) > 1 else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [_text(row.after.get(name), row.style) for name in methods]
        verdict = [leader(row)] if len(methods) > 1 else []
        table.add_row(row.label, _text(row.before, row.style), *cells, *verdict)
    return table


def verdict(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Who is ahead where, in a line."""
    ahead = {row.label: leader(row) for row in rows if leader(row)}
    parts = []
    for name in (*methods, "even"):
        labels = [label for label, who in ahead.items() if who == name]
        short = [x if "accuracy" in x else x.partition(",")[0] for x in labels]
        if short:
            start = "Even" if name == "even" else f"{name} is ahead"
            parts.append(f"{start}: {'; '.join(short)}.")
    return " ".join(parts)
