"""What a number was measured on: versions, processor, threads, commit. Read only."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcpo_kernels import info

ROOT = Path(__file__).resolve().parents[1]
# Environment variables that change the cost of an allocation or the placement of threads.
VARIABLES = ("MALLOC_", "OMP_", "KMP_", "GOMP_", "LD_PRELOAD", "DCPO_KERNELS_", "PYTORCH_", "CUDA_")


@dataclass(frozen=True, kw_only=True)
class Host:
    processor: str
    cores: int
    threads: int
    affinity: list[int]
    load: float
    memory_bytes: int
    kernel: str
    huge_pages: str | None = None


@dataclass(frozen=True, kw_only=True)
class Commit:
    hash: str
    modified: bool


@dataclass(frozen=True, kw_only=True)
class Environment:
    package: dict[str, Any]  # what dcpo info --json prints
    host: Host
    variables: dict[str, str]
    commit: Commit | None = None
    gpu: dict[str, Any] | None = None  # what NVML says of it before the run

    @property
    def instruction_set(self) -> str:
        return self.package.get("cpu", {}).get("isa", "")


def environment(gpu: dict[str, Any] | None) -> Environment:
    return Environment(
        package=info.collect(),
        host=Host(
            processor=_processor(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            affinity=sorted(os.sched_getaffinity(0)),
            load=os.getloadavg()[0],
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=platform.release(),
            huge_pages=_first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        ),
        variables={k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        commit=_commit(),
        gpu=gpu,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _commit() -> Commit | None:
    """Of the checkout that runs; None where the package was installed from a wheel."""

    status = ("status", "--porcelain", "--untracked-files=no")

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return None
        return Commit(hash=git("rev-parse", "HEAD"), modified=bool(git(*status)))
    except (OSError, subprocess.CalledProcessError):
        return None
