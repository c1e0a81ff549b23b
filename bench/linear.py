"""`dcpo bench linear`: from hidden states to the loss and the gradients of hidden states and
weight, beside the three matrix products that it can't do without."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from dcpo_kernels.bench import compare, linear_inputs, memory, stats, timing
from dcpo_kernels.bench.harness import Plan
from dcpo_kernels.bench.linear_inputs import RESPONSES, Exact, LinearCase
from dcpo_kernels.bench.linear_rows import PEERS, PLAIN, PRODUCTS, LinearCall, Products, Way, ways
from dcpo_kernels.bench.records import BadRecord, Conditions, Record, Times
from dcpo_kernels.bench.screen import Bar, Screen
from dcpo_kernels.bench.table import WIDE, cases_of, duration, marks_of, named, size

# (tokens, width, vocabulary) and dtypes that are measured where none is asked for.
SHAPES = {
    "cpu": ((4096, 1024, 32768), (1024, 896, 151936)),
    "cuda": ((4096, 4096, 128256), (8192, 4096, 151936)),
}
DTYPES = {"cpu": ["bf16", "fp32"], "cuda": ["bf16"]}
CHUNKS = [1, 2, 4]
MIN_ROUNDS = 3  # a row takes seconds
LONG_SECONDS = 1.0  # CPU: a call that needs no warm-up: the one that is compared is a sample, too,
SLOW = 2.0  # and the only one where it takes so many times as long as plain PyTorch
TITLE = "hidden states and weight to the policy loss and both gradients"
# What `dcpo bench` takes and this doesn't, and what says that it was not asked for.
OTHERS = {
    "objective": ["dcpo"],
    "masked": 0.0,
    "zero_advantage": 0.0,
    "suite": None,
    "backend": None,
    "baseline": "torch.compile",
    "plot": None,
    "roofline": None,
}
# Errors are relative root mean squares. Plain PyTorch's own is that of rounded logits.
PLAIN_TOLERANCE = 0.1
FACTOR, FLOOR = 2.0, 1e-5  # the others may be off by FACTOR times plain PyTorch's error, and FLOOR


@dataclass(frozen=True, kw_only=True)
class LinearRow(LinearCase):
    """One implementation of one case. Rows of one case were timed in turns, on the same inputs."""

    name: str
    kind: Literal["products", "plain", "ours", "peer"]
    version: str  # of a peer
    note: str
    status: Literal["ok", "missing", "wrong", "interrupted"]  # missing, wrong: not timed, see note
    compared: str = ""  # how much of the gradients
    hidden_error: float | None = None  # relative root mean square, against float64
    weight_error: float | None = None
    extra_bytes: int | None = None  # peak of torch's tensors beyond the inputs, gradients included
    predicted_bytes: int | None = None  # the same, by the rule that memory_limit gives
    samples: list[float] | None = None
    seconds: Times | None = None
    machine: Conditions | None = None

    @property
    def case(self) -> LinearCase:
        return LinearCase(**{of.name: getattr(self, of.name) for of in fields(LinearCase)})

    @property
    def marks(self) -> list[str]:
        return self.machine.marks if self.machine else []


@dataclass(frozen=True, kw_only=True)
class LinearRecord(Record):
    rows: list[LinearRow]


# ---- what is asked for --------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace) -> None:
    if args.operators != ["linear"]:
        raise BadRecord("linear has rows of its own: ask for it alone")
    for name, unasked in OTHERS.items():
        if getattr(args, name) != unasked:
            raise BadRecord(f"--{name.replace('_', '-')} does not go with linear")
    for name in args.peers or ():
        if name not in PEERS:
            raise BadRecord(f"--peers {name}: has no head with a policy loss that is known here")


def cases(args: argparse.Namespace, device: str) -> list[LinearCase]:
    """SHAPES, or those that are given, with the second of SHAPES for what is not."""
    shapes = SHAPES[device]
    given = (args.tokens, args.width, args.vocab)
    if any(given):
        tokens, width, vocab = (x or [usual] for x, usual in zip(given, shapes[1], strict=True))
        shapes = [(n, d, v) for n in tokens for d in width for v in vocab]
    for n, _, _ in shapes:
        if n % RESPONSES:
            raise BadRecord(
                f"--tokens {n}: must be a multiple of {RESPONSES}, the number of responses"
            )
    if max(args.chunks or CHUNKS) > min(n for n, _, _ in shapes):
        raise BadRecord("--chunks: no more than there are tokens")
    return [
        LinearCase(tokens=n, width=d, vocab=v, dtype=dtype, device=device)
        for n, d, v in shapes
        for dtype in args.dtype or DTYPES[device]
    ]


# ---- one case -----------------------------------------------------------------------------------


def run_case(
    case: LinearCase, chunks: Sequence[int], plan: Plan, progress: Bar, rows: list[LinearRow]
) -> bool:
    """Appends the case's rows and says whether it ran to the end: Ctrl-C keeps what was
    measured."""
    timed: list[tuple[int, timing.Timeable]] = []  # index of the row, what to time again
    gc.collect()  # what an earlier case left behind
    try:
        progress.stage("inputs")
        batch = linear_inputs.make(case)
        progress.stage("float64 gradients")
        exact = Exact(batch)
        plain: LinearRow | None = None
        for way in ways(batch, chunks, plan.peers):
            progress.stage(way.name)
            row = LinearRow(
                **asdict(case),
                name=way.name,
                kind=way.kind,
                version=way.version,
                note=way.note,
                status="interrupted" if way.make else "missing",
                predicted_bytes=way.predicted_bytes,
            )
            rows.append(row)
            if way.make is None:
                continue
            try:
                call = way.make()
                row = rows[-1] = _admit(way, row, call, exact, plain, plan.clock)
            except Exception as error:  # maybe a peer's bug: the others are still worth timing
                note = f"{type(error).__name__}: {error}"[:300]
                rows[-1] = replace(row, status="wrong", note=note)
                continue
            if way.name == PLAIN:
                plain = row
            if row.status == "wrong":
                continue
            most = SLOW * max(sum(plain.samples or ()), LONG_SECONDS) if plain else math.inf
            if sum(row.samples or ()) <= most:
                timed.append((len(rows) - 1, call if row.samples else plan.clock.prepare(call)))
        del exact
        progress.stage("timing")
        rounds_behind = 1 if all(rows[at].samples for at, _ in timed) else 0
        with plan.watch() as watch:
            samples, finished = timing.interleave(
                [call for _, call in timed],
                plan.clock,
                plan.seconds,
                progress.rounds,
                least=MIN_ROUNDS - rounds_behind,
            )
    except KeyboardInterrupt:
        return False
    for (at, _), times in zip(timed, samples, strict=True):
        rows[at] = replace(rows[at], samples=(rows[at].samples or []) + times)
    for at, row in enumerate(rows):
        if row.case == case and row.status == "interrupted" and row.samples:
            done = {"status": "ok", "seconds": stats.summarize(row.samples)}
            rows[at] = replace(row, machine=watch.report(), **done)
    return finished


class _Kept:
    """A call whose result is still there when its clock has stopped."""

    def __init__(self, call: LinearCall | Products) -> None:
        self.call, self.result = call, None

    def restore(self) -> None:
        self.call.restore()

    def __call__(self) -> None:
        self.result = self.call()


def _admit(
    way: Way,
    row: LinearRow,
    call: LinearCall | Products,
    exact: Exact,
    plain: LinearRow | None,
    clock: timing.Clock,
) -> LinearRow:
    """The row with its memory and its errors; "wrong" where these are too large."""
    kept, seconds = _Kept(call), []
    if row.device == "cuda":
        peak = memory.peak_extra_bytes(kept, row.device)
    else:
        peak = memory.peak_extra_bytes(lambda: seconds.append(clock.sample(kept)), row.device)
    row = replace(row, samples=[x for x in seconds if x >= LONG_SECONDS], extra_bytes=peak)
    if isinstance(call, Products) or way.problem is None or kept.result is None:
        return replace(row, extra_bytes=call.nbytes) if isinstance(call, Products) else row
    errors = exact.errors(way.problem, kept.result)
    allowed = [PLAIN_TOLERANCE] * 2
    if way.name != PLAIN:
        if plain is None or plain.hidden_error is None or plain.weight_error is None:
            raise RuntimeError(f"{PLAIN}, which it is compared with, did not run")
        allowed = [FACTOR * x + FLOOR for x in (plain.hidden_error, plain.weight_error)]
    wrong = [
        f"d_{name} is off by {error:.1e} (allowed {most:.1e})"
        for name, error, most in zip(("hidden", "weight"), errors, allowed, strict=True)
        if not error <= most
    ]
    of_hidden, of_weight = (x if math.isfinite(x) else None for x in errors)
    if wrong:
        row = replace(row, samples=None)
    return replace(
        row,
        status="wrong" if wrong else row.status,
        note="; ".join(wrong) or row.note,
        compared=f"{len(exact.rows)} of {row.tokens} rows of d_hidden, {len(exact.ids)} of "
        f"{row.vocab} of d_weight",
        hidden_error=of_hidden,
        weight_error=of_weight,
    )


# ---- what is said of it -------------------------------------------------------------------------


def show(screen: Screen, record: LinearRecord, old: LinearRecord | None) -> int:
    """The tables, from the record alone; the exit status."""
    header = ["", "median", "x products", "memory", "d_hidden", "d_weight"]
    header += ["by the rule", "95 % of it"]
    for case, group in cases_of(record.rows):
        ceiling, plain = named(group, PRODUCTS), named(group, PLAIN)
        lines = [_line(row, ceiling, plain) for row in group if row.seconds]
        if lines:
            lines.insert(0, header)
            if screen.width < WIDE:
                lines = [line[:-2] for line in lines]
            screen.table(case.describe(), lines[0], lines[1:])
        for row in group:
            if row.status == "wrong":
                screen.say(f"  WRONG: {row.name}: {row.note}", "red")
            elif row.note:
                missing = "" if row.seconds else f"{row.status}: "
                screen.say(f"  {row.name}: {missing}{row.note}", "dim")
        for compared in {row.compared: None for row in group if row.compared}:
            what = f"root mean square error over that of {PLAIN}, by {compared}"
            screen.say(f"  d_hidden, d_weight: {what}", "dim")
        for text in marks_of(group):
            screen.say(f"  ! {text}", "yellow")
        screen.say("")
    if old is not None:
        compare.show(screen, record, old)
    if any(row.status == "wrong" and row.kind != "peer" for row in record.rows):
        return 1
    return 0 if record.complete else 130


def _line(row: LinearRow, ceiling: LinearRow | None, plain: LinearRow | None) -> list[str]:
    s = row.seconds
    assert s is not None

    def over(error: float | None, of_plain: float | None) -> str:
        return f"{error / of_plain:.2f}" if error is not None and of_plain else ""

    return [
        f"{row.name} {row.version}".strip() + (" !" if row.marks else ""),
        duration(s.median),
        f"{s.median / ceiling.seconds.median:.2f}" if ceiling and ceiling.seconds else "",
        size(row.extra_bytes or 0),
        over(row.hidden_error, plain and plain.hidden_error),
        over(row.weight_error, plain and plain.weight_error),
        size(row.predicted_bytes) if row.predicted_bytes else "",
        f"{duration(s.low)} - {duration(s.high)}" if s.samples > 1 else "timed once",
    ]
