"""Shared by all tests: the golden values, and the backends that this machine can run."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        import interpreter  # noqa: F401

import dcpo_kernels as dk
from dcpo_kernels import backends
from dcpo_kernels.backends import _compiled

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> Any:
    """A golden file, which must be there and hold something."""
    data = json.loads((GOLDEN / name).read_text())
    assert data, f"{name} is empty"
    return data


def preset(name: str, params: dict[str, Any], **parts: Any) -> dk.Objective:
    """The objective of a golden case, whose params are named as in DESIGN.md, not as in our
    signatures."""
    p = dict(params)
    if name == "grpo":
        assert p["eps_low"] == p["eps_high"]
        return dk.grpo(p["eps_low"], **parts)
    if name == "ppo":
        return dk.ppo(p["eps_low"], p["dual_clip"], **parts)
    if name == "dppo":
        return dk.dppo(
            p["divergence"],
            (p["limit_low"], p["limit_high"]),
            p["ratio_cap"],
            **parts,
        )
    return getattr(dk, name)(**p, **parts)


# Everything a test of a backend runs on: CPU instruction sets are forced one by one.
CPU_ISAS = [] if _compiled.missing else _compiled.C.cpu_isas()
KERNELS = [f"cpu-{isa}" for isa in CPU_ISAS]
INTERPRETED = [] if backends.unavailable("triton", "cpu") else ["triton"]


@pytest.fixture
def use_backend(request):
    """Turns "cpu-avx2" into backend="cpu" with that instruction set in use, and puts the old one
    back."""
    name = request.param
    if not name.startswith("cpu-"):
        yield name
        return
    before = _compiled.C.cpu_isa()
    _compiled.C.cpu_use_isa(name.removeprefix("cpu-"))
    yield "cpu"
    _compiled.C.cpu_use_isa(before)


def on_backends(*names: str):
    """Parametrize a test over backends; by default the reference and every compiled body."""
    return pytest.mark.parametrize("use_backend", names or ["reference", *KERNELS], indirect=True)


needs_kernels = pytest.mark.skipif(not KERNELS, reason="the compiled module is missing")


def on_kernels(*names: str):
    """The same for what compiled bodies alone do; by default each of them."""
    return on_backends(*(names or KERNELS or [pytest.param("reference", marks=needs_kernels)]))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_report_header() -> str:
    chosen = {row["tensor"]: row["backend"] for row in backends.explain()}
    return (
        f"dcpo_kernels {dk.__version__}, torch {torch.__version__}, cpu {CPU_ISAS}, "
        f"backends {chosen}"
    )
