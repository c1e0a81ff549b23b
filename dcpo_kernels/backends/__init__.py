"""Which implementation serves a tensor, and why.

A backend is a module with `fused`, `row_stats`, `row_gradient` and `scale` (backends/native.py
shows their arguments), or "reference", which losses.py runs as plain PyTorch under autograd.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import dcpo_kernels.backends.native  # noqa: F401  the compiled module watches for forks from now on

# In order of preference.
_CANDIDATES = {"cpu": ("cpu", "reference", "triton"), "cuda": ("cuda", "triton", "reference")}
_MODULES = {
    "cpu": "dcpo_kernels.backends.native",
    "cuda": "dcpo_kernels.backends.cuda",
    "triton": "dcpo_kernels.backends.triton",
}
NAMES = ("auto", "reference", *_MODULES)


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@functools.cache
def unavailable(name: str, device: str) -> str:
    """Why a backend can't serve tensors of this device; empty if it can."""
    if name not in _CANDIDATES.get(device, ("reference",)):
        return f"does not serve {device} tensors"
    if name == "reference":
        return ""
    return _load(name).unavailable(device)


def choose(backend: str, device: str) -> str:
    """The backend that serves tensors of a device type: `backend` if it is not "auto", else
    DCPO_KERNELS_BACKEND, else the best one there is. ValueError for a name that is none,
    RuntimeError with the reason for one that can't serve."""
    if backend == "auto":
        backend = os.environ.get("DCPO_KERNELS_BACKEND", "auto") or "auto"
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(NAMES)}")
    if backend != "auto":
        reason = unavailable(backend, device)
        if reason:
            raise RuntimeError(f"backend={backend!r} can't be used for {device} tensors: {reason}")
        return backend
    return next(
        name for name in _CANDIDATES.get(device, ("reference",)) if not unavailable(name, device)
    )


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler:
# torch.compile calls `choose` while it traces and keeps the answer.
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def kernels(backend: str, device: str) -> ModuleType:
    """The module that launches a backend's kernels; `backend` as `choose` returned it."""
    return _load(backend)


_DESCRIPTIONS = {
    "cpu": "compiled kernels",
    "cuda": "compiled kernels",
    "triton": "Triton kernels",
    "reference": "plain PyTorch under autograd: several copies of the logits",
}


def explain() -> list[dict[str, Any]]:
    """For each device type: the backend its tensors get, why, and what the others lack."""
    table = []
    for device, names in _CANDIDATES.items():
        others = []
        for name in names:
            reason = unavailable(name, device)
            others.append(
                {"backend": name, "available": not reason, "reason": reason or _DESCRIPTIONS[name]}
            )
        chosen = choose("auto", device)
        forced = os.environ.get("DCPO_KERNELS_BACKEND")
        reason = f"DCPO_KERNELS_BACKEND={forced}" if forced else _DESCRIPTIONS[chosen]
        table.append({"tensor": device, "backend": chosen, "reason": reason, "others": others})
    return table
