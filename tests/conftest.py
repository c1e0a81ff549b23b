"""Shared by all tests: Triton's interpreter where there is no GPU, and the choice of a backend."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

# Before torch is imported: OpenMP's threads wait asleep. With a worker per core they would spin on
# a core that another worker's threads need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        import interpreter  # noqa: F401

from backends import CPU, use

import dcpo_kernels as dk
from dcpo_kernels import backends


@pytest.fixture
def use_backend(request):
    """What policy_loss is told to run on the backend that the test is parametrized with."""
    with use(request.param) as backend:
        yield backend


@pytest.fixture
def unchecked_ids(monkeypatch):
    """As on a GPU, where looking at an id would mean waiting for it."""
    for name in ("fused", "row_stats"):
        module = importlib.import_module(f"dcpo_kernels.ops.{name}")
        monkeypatch.setattr(module, "check_ids", lambda *_: None)


@pytest.fixture
def poisoned():
    """What torch allocates holds NaN: a place that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """What looks at the kernels compiled for one GPU runs in one worker, which compiles them once.
    (pytest-xdist 3.8 has no effect on pytest 9.2 with its mark xdist_group.)"""
    from xdist.scheduler import LoadGroupScheduling

    class ByGPU(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            gpu = re.search(r"test_triton\.py.*\[(sm_\d+|gfx\d+)\]$", nodeid)
            return gpu[1] if gpu else nodeid

    return ByGPU(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_report_header() -> str:
    chosen = {row["tensor"]: row["backend"] for row in backends.explain()}
    return f"dcpo_kernels {dk.__version__}, torch {torch.__version__}, {CPU}, backends {chosen}"
