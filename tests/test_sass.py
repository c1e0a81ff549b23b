"""The machine code of the compiled module's CUDA kernels, for every GPU it was built for: what the
compiler made of them where no test can run them."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

from dcpo_kernels.backends import _compiled

TOOLS = Path("backends", "nvidia", "bin")
# Registers a thread may have, by the launch bounds in csrc/cuda: 65,536 over the threads that are
# to share a multiprocessor.
REGISTERS = {"fused_resident": 64, "fused_streaming": 64, "row_stats": 64, "row_gradient": 80}
REGISTERS |= {"fused_divergence": 128, "multiply_kernel": 255}
# A third of row_stats and row_gradient are for rows with a softcap, and half of fused_divergence.
KERNELS = {"fused_resident": 8, "fused_streaming": 6, "row_stats": 9, "row_gradient": 9}
KERNELS |= {"fused_divergence": 6, "multiply_kernel": 3}
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


class Instruction(NamedTuple):
    address: int
    predicated: bool
    name: str
    operands: str


@functools.cache
def listing(arch: str) -> dict[str, list[Instruction]]:
    """By mangled name."""
    found: dict[str, list[Instruction]] = {}
    pattern = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)(.*?);")
    for line in dump("-sass", "-arch", arch).splitlines():
        if "Function :" in line:
            current = found[line.split(":")[1].strip()] = []
        elif match := pattern.match(line):
            current.append(Instruction(int(match[1], 16), bool(match[2]), *match.group(3, 4)))
    return found


@functools.cache
def code(arch: str) -> dict[str, list[Counter]]:
    """Instructions of each kernel, one counter an instantiation."""
    found: dict[str, list[Counter]] = {name: [] for name in KERNELS}
    for mangled, instructions in listing(arch).items():
        found[kernel(mangled)].append(Counter(i.name for i in instructions))
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
            if name == "fused_resident" and int(arch[3:]) < 90:
                assert set(instructions) <= {"EXIT", "BRA", "NOP", "LDC", "IMAD.MOV.U32", "MOV"}
            elif name == "fused_resident":
                assert count(instructions, r"UBLKCP\.S\.G") == 1, "no bulk load"
                assert count(instructions, r"STAS\.128") == 1, "nothing is sent over the cluster"
                # 16 bytes at a time, and no other way to the logits than the bulk load
                assert count(instructions, r"LDS\.128") >= 8 and count(instructions, r"STG.*\.128")
                assert count(instructions, r"LDG.*\.128") == 0
                # No fence waits for the memory of the GPU, and no wait empties L1 but the cluster's
                # barrier, which is passed once and has no other form.
                assert count(instructions, r"MEMBAR.*(GPU|SYS)") == 0
                assert count(instructions, "CCTL") == count(instructions, "UCGABAR_WAIT") >= 1
            elif name not in SMALL:
                assert count(instructions, r"LDG\.E.*\.128") >= 1, name
                if name != "row_stats":
                    assert count(instructions, r"STG\.E.*\.128") >= 1, name


# ---- what a row costs fused_resident ------------------------------------------------------------

IN_LOOPS, IN_ALL = 14, 19  # warp instructions per 32 logits: over the slice, and with all else


def graph_of(instructions: list[Instruction]) -> networkx.DiGraph:
    """Which instruction may follow which; a call returns."""
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    graph = networkx.DiGraph()
    graph.add_node(0)
    for i, one in enumerate(instructions[:-1]):
        name, target = one.name.split(".")[0], re.search(r"0x([0-9a-f]+)\s*$", one.operands)
        if name == "BRA":
            graph.add_edge(i, at[int(target[1], 16)])
        # A branch may also have its condition among its operands.
        if name not in ("BRA", "EXIT", "RET") or one.predicated or "P" in one.operands:
            graph.add_edge(i, i + 1)
    return graph.subgraph({0} | networkx.descendants(graph, 0))


def cost_of_a_row(
    instructions: list[Instruction], logits_of_a_load: int, vocab: int, cluster: int, warps: int
) -> tuple[float, float]:
    """Warp instructions per 32 logits in the two loops over tiles, and with all else: the longest
    way through the kernel, every other loop once round. Past the exchange goes one warp of a
    block."""
    graph = graph_of(instructions)
    condensed = networkx.condensation(graph)  # a loop is one node
    members = {node: condensed.nodes[node]["members"] for node in condensed}

    def count(node: int, pattern: str) -> int:
        return sum(bool(re.match(pattern, instructions[i].name)) for i in members[node])

    loops = {}
    for node in condensed:
        if len(members[node]) > 1 and count(node, r"MUFU\.EX2"):
            loops[node] = len(members[node]) / (count(node, r"LDS\.128") * logits_of_a_load)
    assert sorted(count(node, r"STG.*\.128") > 0 for node in loops) == [False, True]

    (send,) = (i for i in graph if instructions[i].name.startswith("STAS"))
    exchange = {
        condensed.graph["mapping"][i]
        for i in networkx.descendants(graph, send)
        if instructions[i].name.startswith("SYNCS.PHASECHK")
    }

    def longest(closed: set[int]) -> float:
        cost: dict[int, float] = {}
        for node in reversed(list(networkx.topological_sort(condensed))):
            after = max((cost[other] for other in condensed.successors(node)), default=0)
            own = 0 if node in loops else len(members[node])
            cost[node] = float("-inf") if node in closed else own + after
        return cost[condensed.graph["mapping"][0]]

    most, least = longest(set()), longest(exchange)
    outside = cluster * (most + (warps - 1) * least)
    in_loops = sum(loops.values())
    return in_loops, in_loops + outside / (vocab / 32)


@pytest.mark.parametrize("cluster, threads", [(4, 256), (8, 128)])  # sm_90; sm_100 and later
@pytest.mark.parametrize("vocab", [128256, 151936])
def test_a_row_costs_few_instructions(arch, vocab, cluster, threads):
    cuobjdump()
    if int(arch[3:]) < 90:
        return
    (name,) = (name for name in listing(arch) if "fused_residentINS_8BFloat16ELb0ELi0" in name)
    in_loops, in_all = cost_of_a_row(listing(arch)[name], 8, vocab, cluster, threads // 32)
    assert in_loops <= IN_LOOPS and in_all <= IN_ALL, (in_loops, in_all)


def test_quarters_of_the_exponentials_are_multiply_adds(arch):
    cuobjdump()
    if int(arch[3:]) < 90:
        return
    exponentials = {
        name[-1]: count(Counter(i.name for i in instructions), r"MUFU\.EX2")
        for mangled, instructions in listing(arch).items()
        for name in re.findall(r"fused_residentINS_8BFloat16ELb0ELi\d", mangled)
    }
    assert exponentials["0"] - exponentials["1"] == 8  # of the 32 of a tile
    assert exponentials["0"] - exponentials["2"] == 16
