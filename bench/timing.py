"""How long calls take, measured in turns: whatever happens to the machine happens to all of them.

CPU: one call is one sample of perf_counter_ns, with caches emptied before it by reading something
larger. What a call allocates counts, page faults of fresh memory included: a training step pays
for them too. Freeing what it returns does not count. GPU: graphs.py.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

WARM_UP_SECONDS = 0.2
MIN_ROUNDS, MAX_ROUNDS = 5, 1000


class Timeable(Protocol):
    def restore(self) -> None: ...
    def __call__(self) -> object: ...


class Clock(Protocol):
    """Takes samples on a kind of device."""

    cache: str  # the state of the caches, in words

    def prepare(self, call: Any) -> Timeable: ...  # warmed up
    def sample(self, call: Any) -> float: ...  # seconds of one call


class CpuClock:
    def __init__(self, flush_bytes: int | None = None) -> None:
        size = 4 * last_level_cache_bytes() if flush_bytes is None else flush_bytes
        # Read, not written: the next call must not pay for writing back dirty cache lines.
        self._other = torch.ones(size // 4)
        # Otherwise it would depend on the state of the heap whether a call gets fresh memory.
        self._return_free_memory = _malloc_trim()
        self.cache = f"cold: {size / 2**20:.0f} MiB read before each call" if size else "warm"

    def prepare(self, call: Timeable) -> Timeable:
        end = time.perf_counter() + WARM_UP_SECONDS
        while True:
            call.restore()
            call()
            if time.perf_counter() >= end:
                return call

    def sample(self, call: Timeable) -> float:
        call.restore()
        self._return_free_memory()
        self._other.sum()
        begin = time.perf_counter_ns()
        result = call()
        end = time.perf_counter_ns()
        del result
        return (end - begin) * 1e-9


def _malloc_trim() -> Callable[[], object]:
    """glibc's, where there is one."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: trim(0)


def last_level_cache_bytes() -> int:
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


def interleave(
    calls: Sequence[Any],
    clock: Clock,
    seconds: float,
    after_round: Callable[[int, float], None] = lambda rounds, share: None,
    least: int = MIN_ROUNDS,
) -> tuple[list[list[float]], bool]:
    """Samples of each prepared call, in rounds of one each for about `seconds` and `least` rounds,
    and whether it ran to the end: Ctrl-C keeps the rounds that were finished."""
    samples: list[list[float]] = [[] for _ in calls]
    rounds, begin = 0, time.perf_counter()
    try:
        with no_garbage_collection():
            while rounds < MAX_ROUNDS:
                elapsed = time.perf_counter() - begin
                if rounds >= least and elapsed * (rounds + 1) / rounds > seconds:
                    break
                # Another one begins each round, so that none profits from its place in the order.
                order = [(i + rounds) % len(calls) for i in range(len(calls))]
                times = {i: clock.sample(calls[i]) for i in order}
                for i, t in times.items():
                    samples[i].append(t)
                rounds += 1
                after_round(rounds, (time.perf_counter() - begin) / max(seconds, 1e-9))
    except KeyboardInterrupt:
        return samples, False
    return samples, True


@contextmanager
def no_garbage_collection():
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
