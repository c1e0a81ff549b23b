"""A bench that is over in a moment: shared by the tests of dcpo_kernels.bench."""

from __future__ import annotations

import argparse

import pytest

from dcpo_kernels.backends import _compiled
from dcpo_kernels.bench import cli, timing
from dcpo_kernels.bench.suites import loss

OURS = "reference" if _compiled.missing else "cpu"
CASE = loss(24, 1003, "cpu")  # an odd vocabulary: rows are not aligned


def bench(*arguments: str) -> int:
    """dcpo bench with these arguments."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    quick = ["--device", "cpu", "--seconds", "0", "--baseline", "eager", "--peers", "none"]
    return cli.main(parser.parse_args([*quick, *arguments]))


def make_quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    patch.setattr(timing, "last_level_cache_bytes", lambda: 2**20)
    patch.setattr(cli.signal, "signal", lambda *_: None)  # pytest's own stays


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_quick(monkeypatch)
