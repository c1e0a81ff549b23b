"""One case from inputs to rows: check, memory, time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dcpo_kernels.bench import check, inputs, memory, stats, timing, traffic
from dcpo_kernels.bench.calls import Call, Copy, Implementation
from dcpo_kernels.bench.implementations import implementations
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.shapes import Case


class Progress(Protocol):
    def stage(self, text: str) -> None: ...
    def rounds(self, rounds: int, share: float) -> None: ...


class Watch(AbstractContextManager[Any], Protocol):
    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plan:
    """What all cases of a run have in common."""

    backends: Sequence[str]
    peers: Sequence[str]
    seconds: float
    clock: timing.Clock
    watch: Callable[[], Watch]
    traffic: bool = False  # count that of the plain formulas, for --roofline


def run_case(
    case: Case, operator: Operator, plan: Plan, progress: Progress, rows: list[dict[str, Any]]
) -> bool:
    """Appends the case's rows, as the record keeps them, and says whether it ran to the end: Ctrl-C
    keeps what was measured."""
    timed: list[tuple[dict[str, Any], timing.Timeable]] = []
    gc.collect()  # what an earlier case left behind; none runs while something is measured
    try:
        progress.stage("inputs")
        data = inputs.make(case)
        progress.stage("float64 reference")
        want = check.expected(operator, data)
        for one in implementations(operator, data, plan.backends, plan.peers):
            progress.stage(one.name)
            row: dict[str, Any] = {
                **asdict(case),
                "name": one.name,
                "kind": one.kind,
                "version": one.version,
                "note": one.note,
                "status": "interrupted",
                "minimum_bytes": operator.minimum_bytes(data),
            }
            rows.append(row)
            if one.traffic is not None:
                row["traffic_bytes"] = one.traffic
            if one.make is None:
                row["status"] = "missing"
                continue
            try:
                call = _admit(one, row, operator, data, want, plan.traffic)
                if call is not None:
                    timed.append((row, plan.clock.prepare(call)))
            except Exception as error:  # somebody else's code: the others are still worth timing
                row.update(status="wrong", note=f"{type(error).__name__}: {error}"[:300])
        del want
        progress.stage("timing")
        with plan.watch() as watch:
            samples, finished = timing.interleave(
                [call for _, call in timed], plan.clock, plan.seconds, progress.rounds
            )
    except KeyboardInterrupt:
        return False
    report = watch.report()
    for (row, call), times in zip(timed, samples, strict=True):
        if times:
            row.update(status="ok", samples=times, seconds=stats.summarize(times), machine=report)
            row["note"] = "; ".join(filter(None, (row["note"], getattr(call, "reason", ""))))
    return finished


def _admit(
    one: Implementation,
    row: dict[str, Any],
    operator: Operator,
    data: inputs.Inputs,
    want: check.Expected,
    count_traffic: bool,
) -> Call | Copy | None:
    """Fills in what is known before timing, and returns what may be timed."""
    assert one.make is not None
    call = one.make()
    call.restore()
    if isinstance(call, Copy):
        row["minimum_bytes"] = call.nbytes
    else:
        # A peer with a layout of its own has a problem of its own.
        if call.inputs is not data:
            want = check.expected(operator, call.inputs)
            row["minimum_bytes"] = operator.minimum_bytes(call.inputs)
        counting = traffic.of(one.name) if count_traffic else nullcontext()
        with counting as counted:
            value, gradient = call()
        if counted is not None:
            row["traffic_bytes"] = counted.bytes
        tolerance = check.OUR_VALUE_TOLERANCE if one.kind == "ours" else check.VALUE_TOLERANCE
        agreement = check.compare(value, gradient, want, call.inputs.mask, tolerance)
        row["agreement"] = agreement.asdict()
        if not agreement.ok:
            row.update(status="wrong", note=str(agreement))
            return None
        del value, gradient
        call.restore()
    row["extra_bytes"] = memory.peak_extra_bytes(call, data.case.device)
    if data.case.device == "cpu":
        call.restore()
        row["extra_resident_bytes"] = memory.peak_extra_resident_bytes(call)
    return call
