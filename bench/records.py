"""The results of a run, and the JSON that keeps them: environment, command, commit and every
sample. Whatever is shown is made from it alone. Times are in seconds, sizes in bytes."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from dcpo_kernels.bench import machine
from dcpo_kernels.bench.shapes import Case
from dcpo_kernels.files import written_whole


class BadRecord(Exception):
    """Names a file that is no valid record, and the field that is wrong."""


@dataclass(frozen=True, kw_only=True)
class Times:
    median: float
    min: float
    p20: float
    p80: float
    low: float  # low, high: 95 % bootstrap interval of the median
    high: float
    samples: int  # how many


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Largest errors against the float64 reference; None where they are not finite."""

    value_error: float | None = None
    value_tolerance: float
    gradient_error: float | None = None
    gradient_tolerance: float | None = None  # None: there is no gradient

    @property
    def ok(self) -> bool:
        return all(
            tolerance is None or (error is not None and error <= tolerance)
            for error, tolerance in (
                (self.value_error, self.value_tolerance),
                (self.gradient_error, self.gradient_tolerance),
            )
        )

    def __str__(self) -> str:
        def off(error: float | None, tolerance: float) -> str:
            size = "nan or inf" if error is None else f"{error:.1e}"
            return f"off by {size} (allowed {tolerance:.0e})"

        text = f"value {off(self.value_error, self.value_tolerance)}"
        if self.gradient_tolerance is not None:
            text += f", gradient {off(self.gradient_error, self.gradient_tolerance)}"
        return text


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Of the machine, while the row's case was timed."""

    marks: list[str] = field(default_factory=list)  # why it may have been slower than it can be
    others: float | None = None  # CPU: share of the cores that other processes used
    stolen: float | None = None  # CPU: share that the hypervisor took
    sm_mhz: float | None = None  # GPU: medians, here and below
    memory_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """One implementation of one case. Rows of one case were timed in turns, on the same inputs."""

    name: str
    kind: Literal["ours", "plain", "peer", "copy"]
    version: str  # of a peer
    note: str
    status: Literal["ok", "missing", "wrong", "interrupted"]  # missing, wrong: not timed, see note
    minimum_bytes: int  # least memory traffic of the operator; of a copy, its traffic
    traffic_bytes: int | None = None  # of the implementation, by a model or counted
    agreement: Agreement | None = None
    extra_bytes: int | None = None  # peak of torch's tensors beyond the inputs
    extra_resident_bytes: int | None = None  # CPU: growth of the resident set, a cross-check
    samples: list[float] | None = None
    seconds: Times | None = None
    machine: Conditions | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    @property
    def case(self) -> Case:
        return Case(**{of.name: getattr(self, of.name) for of in fields(Case)})

    @property
    def marks(self) -> list[str]:
        return self.machine.marks if self.machine else []


@dataclass(frozen=True, kw_only=True)
class Record:
    schema: Literal[1] = 1
    created: str  # UTC, ISO 8601
    command: str
    environment: machine.Environment
    cache: str  # state of the caches before each call
    skipped: list[str]  # what this machine could not do
    complete: bool  # else interrupted: the rows hold what was measured until then
    rows: list[Row]


Kind = TypeVar("Kind", bound=Record)  # with the rows of another benchmark


def new(
    cache: str, gpu: dict[str, Any] | None, skipped: list[str], kind: type[Kind] = Record
) -> Kind:
    return kind(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(["dcpo", *sys.argv[1:]]),
        environment=machine.environment(gpu),
        cache=cache,
        skipped=skipped,
        complete=False,
        rows=[],
    )


def save(record: Record, path: Path) -> None:
    """All of it or nothing: a second Ctrl-C must not leave half a file."""
    known = asdict(record, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    text = json.dumps(known, indent=1, allow_nan=False)
    # Thousands of samples, one per line, would bury the rest.
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    with written_whole(path) as part:
        part.write_text(text + "\n")


def load(path: Path, kind: type[Kind] = Record) -> Kind:
    try:
        import pydantic
    except ImportError:
        raise BadRecord("a record is read with pydantic: pip install pydantic") from None
    try:
        text = path.read_bytes()
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except OSError as error:
        raise BadRecord(f"{path}: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])
        problem = f"record{at}: {first['msg']}"
        raise BadRecord(f"{path} is no record of dcpo bench: {problem}") from None
