"""Peak memory that a call takes beyond what was there before it.

On a GPU torch's allocator tells. On a CPU the allocations and frees that it reports to the profiler
are summed up in order. As a cross-check serves the kernel's high-water mark of the resident set,
reset before the call: it includes what does not come from torch (thread stacks, std::vector), but
neither memory that the process had kept from earlier nor pages never touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dcpo_kernels.bench.timing import no_garbage_collection

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints two lines per profile


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Torch's own tensors, results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        no_garbage_collection(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        call()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_extra_resident_bytes(call: Callable[[], object]) -> int | None:
    """The whole process, as Linux counts it; None where it doesn't say."""
    try:
        with no_garbage_collection():
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
