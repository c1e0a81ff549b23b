"""The microbenchmark's clocks, its numbers, and what it sees of the machine.

Nothing here looks at how fast this machine is: bounds on times hold however busy it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_runs import OURS, quick

from dcpo_kernels.backends import _compiled
from dcpo_kernels.bench import (
    graphs,
    implementations,
    machine,
    memory,
    stats,
    timing,
    traffic,
    watch,
)
from dcpo_kernels.bench.records import Conditions, Times

__all__ = ["quick"]


# ---- the clock -----------------------------------------------------------------------------------


class Sleep:
    def __init__(self, seconds: float, before: float = 0.0) -> None:
        self.seconds, self.before, self.calls = seconds, before, 0

    def restore(self) -> None:
        time.sleep(self.before)

    def __call__(self) -> None:
        self.calls += 1
        time.sleep(self.seconds)


def test_clock_sleep():
    clock = timing.CpuClock(0)
    times = [clock.sample(Sleep(0.02)) for _ in range(5)]
    assert 0.02 <= min(times) < 0.2


def test_clock_leaves_out_what_is_put_back():
    clock = timing.CpuClock()
    assert min(clock.sample(Sleep(0.0, before=0.1)) for _ in range(5)) < 0.1


def test_clock_copy():
    """As another clock has it, within a factor that no load explains away in the best of many."""
    source = torch.ones(2**22)
    call = implementations.Copy(source)
    clock = timing.CpuClock(0)
    ours, theirs = [], []
    for _ in range(30):
        ours.append(clock.sample(call))
        begin = time.monotonic_ns()
        call.target.copy_(source)
        theirs.append((time.monotonic_ns() - begin) * 1e-9)
    assert min(theirs) / 5 < min(ours) < 5 * min(theirs)


def test_warm_up_lasts(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.05)
    call = Sleep(0.02)
    timing.CpuClock(0).prepare(call)
    assert call.calls >= 1


class Counting:
    """A clock that counts, and is interrupted at a given sample."""

    cache = "none"

    def __init__(self, stop_at: int = 10**9) -> None:
        self.order: list[str] = []
        self.stop_at = stop_at

    def prepare(self, call):
        return call

    def sample(self, call) -> float:
        if len(self.order) == self.stop_at:
            raise KeyboardInterrupt
        self.order.append(call)
        return float(len(self.order))


def test_rounds_take_turns():
    clock = Counting()
    samples, finished = timing.interleave(["a", "b", "c"], clock, 0.0)
    assert finished
    assert "".join(clock.order[:9]) == "abcbcacab"
    assert [len(s) for s in samples] == [timing.MIN_ROUNDS] * 3


def test_interruption_keeps_whole_rounds():
    samples, finished = timing.interleave(["a", "b", "c"], Counting(stop_at=7), 60.0)
    assert not finished
    assert samples == [[1.0, 6.0], [2.0, 4.0], [3.0, 5.0]]


# ---- a GPU's clock, on a GPU made of paper -------------------------------------------------------


class PaperGpu:
    """The part of torch.cuda that the clock uses: time passes by 1 ms a call in a graph."""

    def __init__(self, l2_bytes: int, captures: bool = True) -> None:
        self.l2_bytes, self.captures = l2_bytes, captures
        self.now, self.capturing, self.holds = 0.0, None, 0

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=self.l2_bytes)

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def _sleep(self, cycles):
        self.holds += 1

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])
        graph.replay = lambda: [call(replayed=True) for call in graph.calls]
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nlong story")
        self.capturing = graph
        yield
        self.capturing = None

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: None
        event.elapsed_time = lambda other: other.at - event.at
        return event


class PaperCall:
    def __init__(self, gpu: PaperGpu, nbytes: int) -> None:
        self.gpu, self.nbytes, self.fresh, self.ran = gpu, nbytes, False, 0
        self.source = torch.empty(0)

    def elsewhere(self):
        return PaperCall(self.gpu, self.nbytes)

    def restore(self):
        self.fresh = True

    def __call__(self, replayed: bool = False):
        if self.gpu.capturing is not None and not replayed:
            self.gpu.capturing.calls.append(self)
            return
        assert self.fresh, "logits were not put back"
        self.fresh = False
        self.ran += 1
        self.gpu.now += 1.0


@pytest.mark.parametrize(
    ("nbytes", "copies"), [(100, 3), (299, 2), (301, 1), (10**6, 1), (1, graphs.MAX_COPIES)]
)
def test_graph_rotates_over_more_than_the_cache(nbytes, copies):
    gpu = PaperGpu(l2_bytes=100)
    clock = graphs.CudaClock(gpu)
    rotation = clock.prepare(PaperCall(gpu, nbytes))
    assert rotation.reason == ""
    assert len(rotation.calls) == len(rotation.graph.calls) == copies
    before = [call.ran for call in rotation.calls]
    assert clock.sample(rotation) == pytest.approx(1e-3)  # of one call
    assert [call.ran for call in rotation.calls] == [n + 1 for n in before]
    assert gpu.holds == 1


def test_graph_that_cannot_be_captured_is_timed_call_by_call():
    gpu = PaperGpu(l2_bytes=100, captures=False)
    clock = graphs.CudaClock(gpu)
    rotation = clock.prepare(PaperCall(gpu, 100))
    assert rotation.graph is None
    assert rotation.reason.endswith("no graph: operation not permitted when stream is capturing")
    assert clock.sample(rotation) == pytest.approx(1e-3)


def test_without_a_graph_one_call_is_timed_with_the_cache_overwritten():
    gpu = PaperGpu(l2_bytes=100)
    clock = graphs.CudaClock(gpu, capture=False)
    rotation = clock.prepare(PaperCall(gpu, 1))
    assert (rotation.graph, rotation.reason, len(rotation.calls)) == (None, "", 1)
    assert clock.sample(rotation) == pytest.approx(1e-3)
    assert len(clock._flush) == 300 and "overwritten" in clock.cache


# ---- numbers -------------------------------------------------------------------------------------


def made_up(middle: float, spread: float, n: int = 50) -> Times:
    x = np.random.default_rng(1).normal(middle, spread, n)
    return stats.summarize(x.tolist())


def test_summary():
    s = stats.summarize([float(i) for i in range(1, 102)])
    assert (s.median, s.min, s.p20, s.p80, s.samples) == (51.0, 1.0, 21.0, 81.0, 101)
    assert 35 < s.low < 51 < s.high < 67
    one = stats.summarize([2.0])
    assert one.low == one.high == one.median == 2.0


def test_interval_covers():
    """A 95 % interval holds the true median nearly always."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        low, high = stats.bootstrap_median(rng.exponential(1.0, 40))
        inside += low <= np.log(2) <= high
    assert inside >= 85


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        ((1.00, 0.01), (1.00, 0.01), "SAME"),
        ((1.01, 0.005), (1.00, 0.005), "SAME"),  # told apart, and too small to matter
        ((1.20, 0.01), (1.00, 0.01), "SLOW"),
        ((0.80, 0.01), (1.00, 0.01), "FAST"),
        ((1.05, 0.50), (1.00, 0.50), "AMBIGUOUS"),
        ((1.00, 0.50), (1.00, 0.50), "AMBIGUOUS"),  # noise says nothing, not that nothing changed
    ],
)
def test_verdicts(new, old, verdict):
    assert stats.verdict(made_up(*new), made_up(*old)) == verdict


def test_speedup():
    s = stats.speedup(made_up(1.0, 0.01), made_up(2.0, 0.01))
    assert s.ratio == pytest.approx(2.0, rel=0.02)
    assert s.low <= s.ratio <= s.high
    assert not s.ambiguous
    assert stats.speedup(made_up(1.0, 0.5), made_up(1.1, 0.5)).ambiguous


# ---- memory and traffic --------------------------------------------------------------------------


def test_memory_of_known_work():
    size = 3 * 2**24  # above what malloc keeps for itself when it is freed

    def call():
        a = torch.ones(size // 4)
        b = torch.empty(2 * size, dtype=torch.int8).zero_()
        del b
        return a

    assert memory.peak_extra_bytes(call, "cpu") == 3 * size
    resident = memory.peak_extra_resident_bytes(call)
    if resident is not None:
        assert 2.5 * size < resident < 4 * size


def test_traffic_of_known_work():
    x = torch.ones(1000)
    with traffic.EagerTraffic() as counted:
        y = x + x.view(10, 100).view(1000)
        y.gather(0, torch.zeros(10, dtype=torch.int64))
    assert counted.bytes == 3 * 4000 + 80 + (80 + 40)  # the sum, the zeros, what gather touches


# ---- the machine ---------------------------------------------------------------------------------


def test_cpu_watch_sees_itself_as_nobody_else():
    with watch.CpuWatch() as seen:
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass
    report = seen.report()
    assert 0 <= report.others <= 1.1
    # 10 s, 5 of them busy here, and half of all cores busy elsewhere
    seen.begin, seen.end = (0.0, 1.0, 10.0, 0.0), (10.0, 6.0, 15.0 + 5.0 * os.cpu_count(), 0.0)
    report = seen.report()
    assert report.others == pytest.approx(0.5)
    assert report.marks == ["others used 50% of the cores"]


class PaperNvml:
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, clocks=(1980,), reasons=(0,)) -> None:
        self.clocks, self.reasons, self.asked = clocks, reasons, 0

    def nvmlDeviceGetClockInfo(self, handle, kind):
        self.asked += kind == 1
        return self.clocks[self.asked % len(self.clocks)] if kind == 1 else 3201

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.reasons[self.asked % len(self.reasons)]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def nvmlSystemGetDriverVersion(self):
        return b"590.10"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)]

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H200"

    def __getattr__(self, name):
        assert name.startswith("nvmlDeviceGet"), f"{name} is not read only"

        def not_supported(*arguments):
            raise self.NVMLError("Not Supported")

        return not_supported


def test_gpu_state_is_read_and_gaps_are_none():
    state = watch.gpu_state(PaperNvml(), None)
    assert (state["name"], state["driver"]) == ("NVIDIA H200", "590.10")
    assert state["other_processes"] == 1
    assert state["ecc"] is None


def test_throttled_rows_are_marked(monkeypatch):
    monkeypatch.setattr(watch, "PERIOD_SECONDS", 0.001)

    def report(nvml) -> Conditions:
        with watch.GpuWatch(nvml, None) as seen:
            while len(seen.samples) < 20:
                time.sleep(0.001)
        return seen.report()

    calm = report(PaperNvml(reasons=(0x1, 0x2)))  # idle, clocks set by somebody: no throttling
    assert calm.marks == []
    assert (calm.sm_mhz, calm.watts, calm.celsius) == (1980, 650.0, 61)
    capped = report(PaperNvml(reasons=(0x4,)))
    assert capped.marks == ["throttled by power cap 100% of the time"]
    slowed = report(PaperNvml(clocks=(1980, 1980, 1980, 1200)))
    assert any(mark.startswith("clock below") for mark in slowed.marks)


def test_environment_says_where_it_ran():
    facts = machine.environment(None)
    assert facts.host.threads == torch.get_num_threads()
    assert facts.package["versions"]["torch"] == torch.__version__
    if OURS == "cpu":
        assert facts.instruction_set == _compiled.C.cpu_isa()
