"""How the Triton backend spreads rows over a GPU: what a model expects of each way to do it.

`python -m dcpo_kernels.bench.launches` prints the table for an H200. bench/gpu_check.py times the
same launches where there is a GPU.

The model: multiprocessors share a memory pipe; a thread loads its part of a tile, waits, and issues
the instructions of its sweep (as many as the SASS has: tests/test_triton.py), four schedulers a
multiprocessor; a program meets at a barrier between the sweeps. A tile of the second
sweep comes from registers, from the L2 cache, or, if the rows under way don't fit there, from
memory. It knows nothing of partitions, of TLBs, of DRAM pages, of clocks that fall.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from dcpo_kernels.backends import triton

VOCABS = (8192, 16384, 32000, 50304, 65536, 102400, 128256, 151936, 202048, 262144)
THREADS = (128, 256, 512)
INSTRUCTIONS = {2: (7.0, 8.8), 4: (5.9, 7.2)}  # a logit of so many bytes, reading it and writing it


@dataclass(frozen=True)
class Gpu:
    """An H200: NVIDIA's figures, and latencies measured by others for the H100."""

    multiprocessors: int = 132
    l2_bytes: int = 50 << 20
    bytes_a_clock: float = 4.8e12 / 1.755e9
    memory_clocks: int = 900
    l2_clocks: int = 300
    head_clocks: int = 900  # a row's scalars: two loads, one after the other
    reduce_clocks: int = 600  # a barrier, a reduction over the threads, "decide"


def share_of_copy(
    vocab: int, size: int, block: int, threads: int, programs: int, gpu: Gpu
) -> float:
    """Of the memory's bandwidth, reading `vocab` logits of `size` bytes a row and writing as many.

    programs: a multiprocessor runs at once. Simulates four multiprocessors with their part of the
    pipe, and leaves out the first and last rows."""
    multiprocessors, warps = 4, threads // 32
    pipe_rate = gpu.bytes_a_clock * multiprocessors / gpu.multiprocessors
    read, write = INSTRUCTIONS[size]
    # The last one, always a full one, stays in registers.
    tiles = sorted(min(block, vocab - start) for start in range(0, vocab, block))
    under_way = gpu.multiprocessors * programs * (vocab - tiles[-1]) * size
    kept = min(1.0, 0.8 * gpu.l2_bytes / max(under_way, 1))
    draw = random.Random(0)
    order = itertools.count()
    events: list[tuple[float, int, Generator]] = []
    pipe = 0.0  # when the memory is free again
    done = []  # when the warps of a row were

    def memory(now: float, bytes_: float) -> float:
        nonlocal pipe
        pipe = max(pipe, now) + bytes_ / pipe_rate
        return pipe

    def issue(scheduler: list[float], now: float, instructions: float) -> float:
        scheduler[0] = max(scheduler[0], now) + instructions  # greedy: a warp goes on while it can
        return scheduler[0]

    def warp(scheduler: list[float], barrier: list[Generator], now: float):
        now = yield now
        for _ in range(max((1 << 23) // vocab // programs, 12)):
            now = yield now + gpu.head_clocks
            for tile in tiles:
                now = yield memory(now, tile * size / warps) + gpu.memory_clocks
                now = yield issue(scheduler, now, tile / threads * read)
            now = yield barrier
            now = yield now + gpu.reduce_clocks
            for i, tile in reversed(list(enumerate(tiles))):
                bytes_ = tile * size / warps
                if i < len(tiles) - 1:
                    if draw.random() < kept:
                        now = yield now + gpu.l2_clocks
                    else:
                        now = yield memory(now, bytes_) + gpu.memory_clocks
                now = yield issue(scheduler, now, tile / threads * write)
                memory(now, bytes_)
            done.append(now)
            now = yield barrier

    for _ in range(multiprocessors):
        schedulers = [[0.0] for _ in range(4)]
        for _ in range(programs):
            barrier: list[Generator] = []
            start = 30000 * draw.random()
            for w in range(warps):
                thread = warp(schedulers[w % 4], barrier, start)
                heapq.heappush(events, (next(thread), next(order), thread))
    while events:
        now, _, thread = heapq.heappop(events)
        try:
            until = thread.send(now)
        except StopIteration:
            continue
        if not isinstance(until, list):
            heapq.heappush(events, (until, next(order), thread))
            continue
        until.append(thread)
        if len(until) == warps:
            for waiting in until:
                heapq.heappush(events, (now, next(order), waiting))
            until.clear()
    done.sort()
    first, last = len(done) // 4, 3 * len(done) // 4
    rate = (last - first) / warps / (done[last] - done[first])
    return rate * 2 * vocab * size / pipe_rate


def launches(vocab: int, size: int, gpu: Gpu) -> list[dict[str, Any]]:
    """What the backend takes for `fused` and aligned rows, and the others there are."""
    device = triton.Device(gpu.multiprocessors, 32, gpu.l2_bytes)
    _, chosen, _ = triton.launch_shape("fused", vocab, size, True, 32, device)
    found = []
    for threads in THREADS:
        programs, (block, lanes), _ = triton.launch_shape(
            "fused", vocab, size, True, 32, device, threads
        )
        if any(entry["threads"] == lanes for entry in found):
            continue  # a row has no more
        programs //= gpu.multiprocessors
        found.append(
            {
                "vocab": vocab,
                "size": size,
                "threads": lanes,
                "programs": programs,
                "block": block,
                "chosen": (block, lanes) == chosen,
                "share": share_of_copy(vocab, size, block, lanes, programs, gpu),
            }
        )
    return found


def main() -> None:
    gpu = Gpu()
    table = Table(title="Triton's fused kernel on an H200, as a model has it", title_justify="left")
    for name in ("logits", "V", *(f"{threads} threads" for threads in THREADS)):
        table.add_column(name, justify="right")
    for size, vocab in itertools.product((2, 4), VOCABS):
        found = {entry["threads"]: entry for entry in launches(vocab, size, gpu)}
        cells = []
        for threads in THREADS:
            entry = found.get(threads)
            text = f"{entry['share']:.0%}" if entry else ""
            cells.append(f"[bold]{text} *[/bold]" if entry and entry["chosen"] else text)
        table.add_row(f"{8 * size} bit", str(vocab), *cells)
    console = Console()
    console.print(table)
    console.print("Share of a copy's bandwidth. *: what the backend takes.")


if __name__ == "__main__":
    main()
