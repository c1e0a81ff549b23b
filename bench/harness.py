"""One case from inputs to rows: check, memory, time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

from dcpo_kernels.bench import check, inputs, memory, stats, timing, traffic
from dcpo_kernels.bench.calls import Call, Copy, Implementation
from dcpo_kernels.bench.implementations import implementations
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.records import Row
from dcpo_kernels.bench.screen import Bar
from dcpo_kernels.bench.shapes import Case
from dcpo_kernels.bench.watch import CpuWatch, GpuWatch


@dataclass(frozen=True)
class Plan:
    """What all cases of a run have in common."""

    backends: Sequence[str]
    peers: Sequence[str]
    seconds: float
    clock: timing.Clock
    watch: Callable[[], CpuWatch | GpuWatch]
    traffic: bool = False  # count that of the plain formulas, for --roofline


def run_case(case: Case, operator: Operator, plan: Plan, progress: Bar, rows: list[Row]) -> bool:
    """Appends the case's rows and says whether it ran to the end: Ctrl-C keeps what was
    measured."""
    timed: list[tuple[int, timing.Timeable]] = []  # index of the row, what to time
    gc.collect()  # what an earlier case left behind; none runs while something is measured
    try:
        progress.stage("inputs")
        data = inputs.make(case)
        progress.stage("float64 reference")
        want = check.expected(operator, data)
        for one in implementations(operator, data, plan.backends, plan.peers):
            progress.stage(one.name)
            row = Row(
                **asdict(case),
                name=one.name,
                kind=one.kind,
                version=one.version,
                note=one.note,
                status="interrupted" if one.make else "missing",
                minimum_bytes=operator.minimum_bytes(data),
                traffic_bytes=one.traffic,
            )
            rows.append(row)
            if one.make is None:
                continue
            try:
                rows[-1], call = _admit(one, row, operator, data, want, plan.traffic)
                if call is not None:
                    timed.append((len(rows) - 1, plan.clock.prepare(call)))
            except Exception as error:  # maybe a peer's bug: the others are still worth timing
                note = f"{type(error).__name__}: {error}"[:300]
                rows[-1] = replace(rows[-1], status="wrong", note=note)
        del want
        progress.stage("timing")
        with plan.watch() as watch:
            samples, finished = timing.interleave(
                [call for _, call in timed], plan.clock, plan.seconds, progress.rounds
            )
    except KeyboardInterrupt:
        return False
    for (at, call), times in zip(timed, samples, strict=True):
        if times:
            rows[at] = replace(
                rows[at],
                status="ok",
                samples=times,
                seconds=stats.summarize(times),
                machine=watch.report(),
                note="; ".join(filter(None, (rows[at].note, getattr(call, "reason", "")))),
            )
    return finished


def _admit(
    one: Implementation,
    row: Row,
    operator: Operator,
    data: inputs.Inputs,
    want: check.Expected,
    count_traffic: bool,
) -> tuple[Row, Call | Copy | None]:
    """The row with what is known before timing, and what may be timed."""
    assert one.make is not None
    call = one.make()
    call.restore()
    if isinstance(call, Copy):
        row = replace(row, minimum_bytes=call.nbytes)
    else:
        # A peer with another layout has inputs and a reference of its own.
        if call.inputs is not data:
            want = check.expected(operator, call.inputs)
            row = replace(row, minimum_bytes=operator.minimum_bytes(call.inputs))
        counting = traffic.of(one.name) if count_traffic else nullcontext()
        with counting as counted:
            value, gradient = call()
        if counted is not None:
            row = replace(row, traffic_bytes=counted.bytes)
        tolerance = check.OUR_VALUE_TOLERANCE if one.kind == "ours" else check.VALUE_TOLERANCE
        agreement = check.compare(value, gradient, want, call.inputs.mask, tolerance)
        row = replace(row, agreement=agreement)
        if not agreement.ok:
            return replace(row, status="wrong", note=str(agreement)), None
        del value, gradient
        call.restore()
    row = replace(row, extra_bytes=memory.peak_extra_bytes(call, data.case.device))
    if data.case.device == "cpu":
        call.restore()
        row = replace(row, extra_resident_bytes=memory.peak_extra_resident_bytes(call))
    return row, call
