"""What is Triton's alone: when it is chosen, and its kernels compiled for GPUs that aren't here
(tests/aot.py). What they compute is in the tests of every backend."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcpo_kernels import backends
from dcpo_kernels.backends import triton

reason = backends.unavailable("triton", "cpu")
interpreted = pytest.mark.skipif(bool(reason), reason=f"Triton's interpreter: {reason}")
compiles = pytest.mark.skipif("triton" in reason, reason=reason)


# ---- choice of backend --------------------------------------------------------------------------


def run_python(*arguments: str) -> str:
    """In a process that never heard of the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command, folder = [sys.executable, *arguments], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_leaves_triton_alone():
    run_python("-c", "import dcpo_kernels, sys; assert 'triton' not in sys.modules")


@interpreted
def test_the_interpreter_is_never_chosen():
    assert backends.choose("auto", "cpu") != "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        backends.choose("triton", "cuda")
    (row,) = (row for row in backends.explain() if row["tensor"] == "cpu")
    assert {"triton"} == {o["backend"] for o in row["others"]} - {"cpu", "reference"}


def test_why_it_can_not_serve_a_cpu_tensor():
    say = "from dcpo_kernels import backends; print(backends.unavailable('triton', 'cpu'))"
    assert "TRITON_INTERPRET=1" in run_python("-c", say) or "triton" in reason


# ---- compiled for GPUs that aren't here ---------------------------------------------------------


@functools.cache
def compiled(arch: str) -> list[dict[str, Any]]:
    entries = json.loads(run_python("aot.py", arch, "all"))
    assert {entry["kernel"] for entry in entries} == set(LOADS)
    return entries


# Sweeps of a row: unmasked, the tail, and the tile that is loaded once.
LOADS = {"fused": 4, "row_stats": 2, "row_gradient": 3, "multiply_": 1}
STORES = {"fused": 3, "row_stats": 0, "row_gradient": 3, "multiply_": 1}
SCALARS = {"fused": 12, "row_stats": 4, "row_gradient": 8, "multiply_": 1}  # one value per row


def on(*archs: str):
    """Those of one GPU look at the same kernels, and go to one worker (conftest.py)."""
    return pytest.mark.parametrize("arch", archs)


NVIDIA = on("sm_80", "sm_90", "sm_100", "sm_120")


@compiles
@NVIDIA
def test_loads_and_stores_are_16_bytes_where_rows_allow_it(arch):
    for entry in compiled(arch):
        kernel, vectors = entry["kernel"], entry["vectors"]
        if entry["aligned"]:
            loads, stores = (LOADS[kernel], STORES[kernel]) if entry["writes"] else (2, 0)
            assert entry["wide_loads"] >= loads * vectors, entry
            assert entry["wide_stores"] >= stores * vectors, entry
            targets = 20 if entry["of"][3:] == [20] else 0  # each with its logit and its g
            assert entry["other_loads"] <= SCALARS[kernel] + targets, entry
            assert entry["other_stores"] <= 10 + targets, entry
        else:
            assert entry["wide_loads"] == entry["wide_stores"] == 0, entry
    assert {entry["aligned"] for entry in compiled(arch)} == {True, False}


@compiles
@NVIDIA
def test_nothing_spills_and_everything_fits(arch):
    for entry in compiled(arch):
        # Some assemblers put a scalar or two of the row aside, once a row.
        assert entry["spills"] == 0 and entry["stack"] <= 16, entry
        # A multiprocessor has 65,536 registers for the 512 threads that the launcher counts on.
        assert entry["registers"] <= 128, entry
        assert entry["shared"] <= 256, entry


# Issued per logit of so many bytes, reading it and writing it.
INSTRUCTIONS = {2: (6.2, 5.8), 4: (5.3, 4.3)}
# An H200: multiprocessors, and bytes per clock of its memory.
MULTIPROCESSORS, BYTES_PER_CLOCK = 132, 4.8e12 / 1.755e9


@compiles
@on("sm_90")
def test_sweeps_issue_few_instructions(arch):
    """At 4.8 TB/s an H200 has a tenth of its issue slots to spare, with an entropy term too."""
    for entry in compiled(arch):
        if entry["kernel"] != "fused" or not entry["aligned"] or not entry["writes"]:
            continue
        if entry["of"][0].split()[0] in ("tv", "kl"):
            continue
        read, masked_read = entry["issued"]["read"]
        masked_write, write = entry["issued"]["write"]
        assert read < masked_read and write < masked_write
        traffic, issued = 2 * entry["size"], masked_read + masked_write
        assert issued < 0.9 * 128 * traffic * MULTIPROCESSORS / BYTES_PER_CLOCK, entry
        if entry["of"] in (["dynamic-clip", "bf16", 151936], ["dynamic-clip", "fp32", 151936]):
            read_limit, write_limit = INSTRUCTIONS[entry["size"]]
            assert 0.95 * read_limit < read <= read_limit, entry
            assert 0.95 * write_limit < write <= write_limit, entry


@pytest.mark.parametrize(
    ("size", "vocab", "threads"),
    [
        *((2, vocab, 256) for vocab in (16384, 32000, 50304, 65536)),  # two programs fit into L2
        *((2, vocab, 512) for vocab in (102400, 128256, 151936, 262144)),
        *((4, vocab, 256) for vocab in (8192, 32000)),
        *((4, vocab, 512) for vocab in (128256, 151936)),
        (2, 8192, 128),  # as small as holds the row
    ],
)
def test_threads_per_row_of_an_h200(size, vocab, threads):
    device = triton.Device(MULTIPROCESSORS, 32, 50 << 20)
    programs, (block, lanes), _ = triton.launch_shape("fused", vocab, size, True, 32, device)
    assert lanes == threads
    assert programs == MULTIPROCESSORS * 512 // threads
    assert block * size <= threads * 128


@compiles
@on("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
def test_no_float64(arch):
    for entry in compiled(arch):
        assert entry["float64"] == 0, entry


@compiles
@on("gfx942")
def test_nothing_keeps_an_amd_gpu_out(arch):
    for entry in compiled(arch):
        if entry["aligned"] and entry["writes"]:
            assert entry["wide_loads"] >= LOADS[entry["kernel"]] * entry["vectors"], entry


@compiles
@pytest.mark.parametrize("vocabs", [("33000", "72000"), ("80000", "320000")], ids="-".join)
def test_twenty_batches_compile_once(vocabs):
    """Whatever N, V, the lengths, the bounds and the temperature are, along a row of the launch
    table."""
    counts = json.loads(run_python("aot.py", "sm_90", "count", *vocabs))
    assert counts == dict.fromkeys(LOADS, 1)
