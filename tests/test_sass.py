"""The machine code of the compiled module's CUDA kernels, for every GPU it was built for: what the
compiler made of them where no test can run them."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dcpo_kernels.backends import _compiled

TOOLS = Path("backends", "nvidia", "bin")
# Registers a thread may have, by the launch bounds in csrc/cuda: 65,536 over the threads that are
# to share a multiprocessor.
REGISTERS = {"fused_cluster": 255, "fused_streaming": 64, "row_stats": 64, "row_gradient": 80}
REGISTERS |= {"fused_divergence": 128, "multiply_kernel": 255}
KERNELS = {"fused_cluster": 6, "fused_streaming": 6, "row_stats": 6, "row_gradient": 6}
KERNELS |= {"fused_divergence": 3, "multiply_kernel": 3}
# Those that take some bytes per row; they are no templates.
SMALL = {"token_weights_kernel": 64, "finish_kernel": 64}
SMALL |= {"decide_kernel": 255, "decide_responses_kernel": 255}
REGISTERS |= SMALL
KERNELS |= dict.fromkeys(SMALL, 1)
STACK = {"token_weights_kernel": 40}  # bytes per thread, of one block in all


@functools.cache
def cuobjdump() -> Path:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / TOOLS / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton has no cuobjdump")
    if _compiled.C is None or not _compiled.C.cuda:
        pytest.skip("the compiled module was built without CUDA (no nvcc)")
    return tool


def dump(*arguments: str) -> str:
    module = _compiled.C.__file__
    return subprocess.check_output([cuobjdump(), *arguments, module], text=True)


def kernel(mangled: str) -> str:
    return next(name for name in KERNELS if re.search(f"{len(name)}{name}[IE]", mangled))


@functools.cache
def code(arch: str) -> dict[str, list[Counter]]:
    """Instructions of each kernel, one counter an instantiation."""
    found: dict[str, list[Counter]] = {name: [] for name in KERNELS}
    current: Counter = Counter()
    for line in dump("-sass", "-arch", arch).splitlines():
        if "Function :" in line:
            current = Counter()
            found[kernel(line)].append(current)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            current[match[1]] += 1
    return found


def count(instructions: Counter, pattern: str) -> int:
    return sum(n for name, n in instructions.items() if re.match(pattern, name))


def pytest_generate_tests(metafunc):
    if "arch" in metafunc.fixturenames:
        try:
            archs = sorted(set(re.findall(r"sm_\d+", dump("-lelf"))))
        except pytest.skip.Exception:
            archs = ["none"]
        metafunc.parametrize("arch", archs)


def test_every_kernel_is_there(arch):
    cuobjdump()
    assert {name: len(found) for name, found in code(arch).items()} == KERNELS


def test_registers_within_the_launch_bound_and_no_spills():
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    assert len(resources) >= sum(KERNELS.values())
    for name, registers, stack in resources:
        assert int(registers) <= REGISTERS[kernel(name)], name
        assert int(stack) <= STACK.get(kernel(name), 0), name


def test_instructions(arch):
    cuobjdump()
    for name, found in code(arch).items():
        for instructions in found:
            assert count(instructions, r"LDL|STL") == 0 or name in STACK, f"{name} spills"
            # D...: float64 arithmetic; DEPBAR is a barrier
            assert count(instructions, r"D(?!EPBAR)|F2F\.F64|F2F\.\w+\.F64|.*\.64F") == 0, name
            if name == "fused_cluster" and int(arch[3:]) < 90:
                assert set(instructions) <= {"EXIT", "BRA", "NOP", "LDC", "IMAD.MOV.U32", "MOV"}
            elif name == "fused_cluster":
                assert count(instructions, r"UBLKCP\.S\.G") >= 1, "no bulk loads"
                assert count(instructions, r"UBLKCP\.G\.S") >= 1, "no bulk stores"
                assert count(instructions, r"STAS\.128") >= 1, "nothing is sent over the cluster"
                assert count(instructions, r"FENCE\.VIEW\.ASYNC") >= 1, "no fence for the copies"
                # shared memory 16 bytes at a time, both ways
                assert count(instructions, r"LDS\.128") >= 4 and count(instructions, r"STS\.128")
                # no other way to the logits than the bulk copies
                assert count(instructions, r"LDG.*\.128") == 0
            elif name not in SMALL:
                assert count(instructions, r"LDG\.E.*\.128") >= 1, name
                if name != "row_stats":
                    assert count(instructions, r"STG\.E.*\.128") >= 1, name
