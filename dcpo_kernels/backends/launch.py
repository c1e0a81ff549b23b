"""How a GPU's kernels are launched, where a test or a benchmark does not leave it to the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Launch(NamedTuple):
    cluster: int = -1  # CUDA, `fused`: blocks that hold a row; 0 streams it; -1: csrc/cuda/plan.h
    program_threads: int = 0  # Triton: of a program; 0: triton.launch_shape


_BY_TABLE = Launch()
_current = ContextVar("launch", default=_BY_TABLE)


def current() -> Launch:
    return _current.get()


@contextmanager
def launched(**how: int) -> Iterator[None]:
    """What is launched within, by the fields of Launch."""
    token = _current.set(Launch(**how))
    try:
        yield
    finally:
        _current.reset(token)
