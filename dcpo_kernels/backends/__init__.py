"""Which implementation serves a tensor, and why.

A backend is a module with a function for each operator; backends/reference.py has them all, in
plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import dcpo_kernels.backends._compiled  # noqa: F401  the module watches for forks from now on

# In order of preference.
_CANDIDATES = {"cpu": ("cpu", "reference", "triton"), "cuda": ("cuda", "triton", "reference")}
_MODULES = {
    "reference": "dcpo_kernels.backends.reference",
    "cpu": "dcpo_kernels.backends.cpu",
    "cuda": "dcpo_kernels.backends.cuda",
    "triton": "dcpo_kernels.backends.triton",
}
NAMES = ("auto", *_MODULES)


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@functools.cache
def unavailable(name: str, device: str) -> str:
    """Why a backend can't serve tensors of this device; empty if it can."""
    if name not in _CANDIDATES.get(device, ("reference",)):
        return f"does not serve {device} tensors"
    return _load(name).unavailable(device)


def choose(backend: str, device: str) -> str:
    """The backend that serves tensors of a device type: `backend` if it is not "auto", else
    DCPO_KERNELS_BACKEND, else the best one there is. ValueError for a name that is none,
    RuntimeError with the reason for one that can't serve. Warns once where plain PyTorch serves
    for want of kernels, or the compiled module could not be loaded."""
    if backend == "auto":
        backend = os.environ.get("DCPO_KERNELS_BACKEND", "auto") or "auto"
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(NAMES)}")
    if backend != "auto":
        reason = unavailable(backend, device)
        if reason:
            raise RuntimeError(f"backend={backend!r} can't be used for {device} tensors: {reason}")
        return backend
    chosen = _best(device)
    if device in _CANDIDATES and (chosen == "reference" or _load("cpu").unavailable()):
        _warn(device, chosen)
    return chosen


def _best(device: str) -> str:
    names = _CANDIDATES.get(device, ("reference",))
    return next(name for name in names if not unavailable(name, device))


@functools.cache
def _warn(device: str, chosen: str) -> None:
    names = _CANDIDATES[device]
    reasons = [f"{name}: {unavailable(name, device)}" for name in names[: names.index(chosen)]]
    warnings.warn(
        f"dcpo_kernels serves {device} tensors with {chosen}, {_DESCRIPTIONS[chosen]}, for want of "
        f"faster kernels ({'; '.join(reasons)}). Ask for backend={chosen!r} or set "
        f"DCPO_KERNELS_BACKEND={chosen} to do without this warning",
        RuntimeWarning,
        stacklevel=2,
    )


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler:
# torch.compile calls `choose` while it traces and keeps the answer.
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def kernels(backend: str) -> ModuleType:
    """The module that launches a backend's kernels; `backend` as `choose` returned it."""
    return _load(backend)


_DESCRIPTIONS = {
    "cpu": "compiled kernels",
    "cuda": "compiled kernels",
    "triton": "Triton kernels",
    "reference": "plain PyTorch under autograd: several copies of the logits",
}


def _describe(name: str) -> str:
    instructions = f", {_load('cpu').C.cpu_isa()}" if name == "cpu" else ""
    return _DESCRIPTIONS[name] + instructions


def explain() -> list[dict[str, Any]]:
    """For each device type: the backend its tensors get (None if DCPO_KERNELS_BACKEND names one
    that can't serve them), why, and what the others lack."""
    table = []
    for device, names in _CANDIDATES.items():
        missing = {name: unavailable(name, device) for name in names}
        others = [
            {"backend": name, "available": not why, "reason": why or _describe(name)}
            for name, why in missing.items()
        ]
        forced = os.environ.get("DCPO_KERNELS_BACKEND", "auto") or "auto"
        try:
            chosen = _best(device) if forced == "auto" else choose(forced, device)
        except RuntimeError as error:
            chosen, reason = None, f"DCPO_KERNELS_BACKEND: {error}"
        else:
            reason = _describe(chosen) if forced == "auto" else f"DCPO_KERNELS_BACKEND={forced}"
        table.append({"tensor": device, "backend": chosen, "reason": reason, "others": others})
    return table
