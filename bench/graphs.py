"""Timing on a GPU: one captured graph per implementation, events around its replays.

A graph holds one call for each of several copies of the logits, together more than three times the
L2 cache: no call finds its logits there, and none waits for Python. What a call overwrote is put
back before each replay, outside the events. The host queues events and graph while the GPU is held
busy, so that only the GPU's time lies between them.

A call that can't be captured (it waits for the GPU, or counts on the host), or is not to be, is
timed one by one, with the L2 cache overwritten before each.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from dcpo_kernels.bench.calls import Call, Copy
from dcpo_kernels.bench.timing import WARM_UP_SECONDS

CACHE_FACTOR = 3
MAX_COPIES = 32  # small logits: enough calls to be longer than what surrounds them
HOLD_CYCLES = 400_000  # some 0.2 ms


class Rotation:
    """Calls on copies of the logits, as one thing to time."""

    def __init__(self, calls: list[Call | Copy]) -> None:
        self.calls = calls
        self.graph: Any = None
        self.reason = ""  # why there is no graph

    def restore(self) -> None:
        for call in self.calls:
            call.restore()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()


class CudaClock:
    def __init__(self, cuda: Any = torch.cuda, capture: bool = True) -> None:
        self.cuda, self.capture = cuda, capture
        self.l2_bytes = cuda.get_device_properties(cuda.current_device()).L2_cache_size
        self.cache = (
            f"cold: rotating over {CACHE_FACTOR} times the L2 cache of "
            f"{self.l2_bytes / 2**20:.0f} MiB"
        )
        if not capture:
            self.cache = "cold: the L2 cache is overwritten before each call"
        self._flush: Any = None

    def prepare(self, call: Call | Copy) -> Rotation:
        wanted = -(-CACHE_FACTOR * self.l2_bytes // call.nbytes) if self.capture else 1
        copies = min(MAX_COPIES, wanted)
        rotation = Rotation([call, *(call.elsewhere() for _ in range(copies - 1))])
        # On a stream of its own, as a capture requires: there the first call sets up what it needs.
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            end = time.perf_counter() + WARM_UP_SECONDS
            while True:
                rotation.restore()
                rotation()
                self.cuda.synchronize()
                if time.perf_counter() >= end:
                    break
        self.cuda.current_stream().wait_stream(side)
        rotation.restore()
        if not self.capture:
            return rotation
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                rotation()
        except RuntimeError as error:
            self.cuda.synchronize()
            rotation.reason = f"timed call by call, no graph: {str(error).splitlines()[0]}"
        else:
            rotation.graph = graph
        return rotation

    def sample(self, rotation: Rotation) -> float:
        rotation.restore()
        if rotation.graph is not None:
            return self._between_events(rotation) / len(rotation.calls)
        if self._flush is None:
            self._flush = torch.empty(
                CACHE_FACTOR * self.l2_bytes,
                dtype=torch.int8,
                device=rotation.calls[0].source.device,
            )
        self._flush.zero_()
        return self._between_events(rotation.calls[0])

    def _between_events(self, call: Any) -> float:
        begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.cuda._sleep(HOLD_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
