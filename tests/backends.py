"""What a test of the losses runs on. A test is written once, for each of these by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import emulator
import pytest
import torch

from dcpo_kernels import backends
from dcpo_kernels.backends import _compiled

# A test is for what takes milliseconds a batch, unless it says more.
CPU = [f"cpu-{isa}" for isa in (["portable"] if _compiled.missing else _compiled.C.cpu_isas())]
SLOW = ["triton interpreted", "cuda emulated"]  # milliseconds per row
GPU = ["cuda", "triton"]
KERNELS = [*CPU, *SLOW]
ON_CPU = ["reference", *KERNELS]
EVERYWHERE = [*ON_CPU, *GPU]

needs_kernels = pytest.mark.skipif(bool(_compiled.missing), reason="the compiled module is missing")


@contextmanager
def use(name: str) -> Iterator[str]:
    """For as long as it lasts, the `backend` that it yields runs on `name`. Skips where that can't
    be."""
    if name in GPU and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    backend = re.split("[- ]", name)[0]
    with emulator.installed() if name == "cuda emulated" else nullcontext():
        if reason := backends.unavailable(backend, "cuda" if name in GPU else "cpu"):
            pytest.skip(reason)
        if backend != "cpu":
            yield backend
            return
        before = _compiled.C.cpu_isa()
        _compiled.C.cpu_use_isa(name.removeprefix("cpu-"))
        yield backend
        _compiled.C.cpu_use_isa(before)


def device_of(backend: str) -> str:
    """Where its tensors are: interpreted and emulated, a GPU's kernels take those of a CPU."""
    return "cuda" if backend in GPU and backends.unavailable(backend, "cpu") else "cpu"


def on_backends(*names: str):
    """Parametrize a test over backends."""
    values = [
        pytest.param(name, marks=[pytest.mark.gpu] if name in GPU else [])
        for name in names or ["reference", *CPU]
    ]
    return pytest.mark.parametrize("use_backend", values, indirect=True)
