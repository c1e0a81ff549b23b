"""What happened to the machine while something was timed. Read only: nothing is ever set.

CPU: the share of the processor that others took. GPU: clocks, power, temperature and the reasons
the driver gives for slowing down, every 50 ms, through NVML.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dcpo_kernels.bench.records import Conditions

PERIOD_SECONDS = 0.05
MAX_OTHERS = 0.1  # of the cores
MIN_CLOCK = 0.9  # of the run's median
REASONS = {  # nvmlClocksEventReason*: those that make results smaller than they could be
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (driver)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


class CpuWatch:
    """`with CpuWatch() as watch: ...; watch.report()`"""

    def __enter__(self) -> CpuWatch:
        self.begin = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.end = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Wall clock, this process, busy, stolen by the hypervisor; seconds, over all cores."""
        tick = os.sysconf("SC_CLK_TCK")
        line = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(x) / tick for x in line)
        busy = user + nice + system + irq + softirq
        own = os.times()
        return time.perf_counter(), own.user + own.system, busy, steal

    def report(self) -> Conditions:
        wall, own, busy, steal = (b - a for a, b in zip(self.begin, self.end, strict=True))
        cores = (os.cpu_count() or 1) * max(wall, 1e-9)
        others = max(0.0, busy - own) / cores
        marks = [f"others used {others:.0%} of the cores"] if others > MAX_OTHERS else []
        if steal / cores > MAX_OTHERS:
            marks.append(f"the hypervisor took {steal / cores:.0%}")
        return Conditions(others=others, stolen=steal / cores, marks=marks)


class GpuWatch:
    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.samples: list[dict[str, float]] = []
        self._stop = threading.Event()

    def __enter__(self) -> GpuWatch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            self.samples.append(gpu_now(self.nvml, self.handle))

    def report(self) -> Conditions:
        marks, middle = [], {}
        if self.samples:
            for bit, text in REASONS.items():
                hit = sum(bool(int(s["reasons"]) & bit) for s in self.samples) / len(self.samples)
                if hit:
                    marks.append(f"throttled by {text} {max(hit, 0.01):.0%} of the time")
            middle = {
                key: statistics.median(s[key] for s in self.samples)
                for key in ("sm_mhz", "memory_mhz", "watts", "celsius")
            }
            slow = [s for s in self.samples if s["sm_mhz"] < MIN_CLOCK * middle["sm_mhz"]]
            if slow:
                marks.append(f"clock below 90 % of its median {len(slow)} times")
        return Conditions(**middle, marks=marks)


def gpu_now(nvml: Any, handle: Any) -> dict[str, float]:
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return {
        "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "reasons": reasons(handle),
    }


def gpu_state(nvml: Any, handle: Any) -> dict[str, Any]:
    """What stays the same during a run; None for what this GPU or its driver does not tell."""

    def ask(question: Any, *arguments: Any) -> Any:
        try:
            answer = question(handle, *arguments)
        except nvml.NVMLError:
            return None
        return answer.decode() if isinstance(answer, bytes) else answer

    driver = nvml.nvmlSystemGetDriverVersion()
    watts = ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses) or []
    return {
        "name": ask(nvml.nvmlDeviceGetName),
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "max_sm_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "max_memory_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": None if watts is None else watts / 1000,
        "performance_state": ask(nvml.nvmlDeviceGetPerformanceState),
        "ecc": ask(nvml.nvmlDeviceGetEccMode),
        "mig": ask(nvml.nvmlDeviceGetMigMode),
        "other_processes": sum(process.pid != os.getpid() for process in processes),
    }


def open_gpu() -> tuple[Any, Any, str]:
    """(nvml, handle of torch's current GPU, "") or (None, None, why not)."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), ""
    except (pynvml.NVMLError, AttributeError, RuntimeError) as error:
        return None, None, f"NVML does not answer: {error}"
