"""Compiles what backend="triton" would run, for GPUs that aren't here, and prints what came of it.

`python tests/aot.py sm_90 all` prints a JSON list, one entry a compiled kernel. Every entry went
through the operator and the launcher, so it has the constants, block and warps that a GPU would
get. `python tests/aot.py sm_90 count 80000 320000` prints how often each kernel was compiled for
twenty batches with vocabularies from one to the other.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpuless
import torch
import triton

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.backends import triton as backend
from dcpo_kernels.kernels import row as kernels
from dcpo_kernels.objective import (
    DIVERGENCES,
    KL_ESTIMATORS,
    SURROGATES,
    WHOLE_RESPONSE,
    Objective,
)
from dcpo_kernels.ops.records import Options, RowCoefficients, Rows, Targets, Tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Every surrogate and every divergence: what "decide" and the row kernel are compiled for.
OBJECTIVES = {
    **{name: Objective(name, surrogate=name) for name in SURROGATES if name not in WHOLE_RESPONSE},
    **{name: dk.dppo(name) for name in DIVERGENCES if name != "none"},
}
PENALTIES = [dk.dppo(name, penalty_coef=0.1) for name in DIVERGENCES if name != "none"]
ESTIMATORS = [
    dk.ipo(kl_coef=0.1, kl_estimator=kl, old_kl_estimator=old_kl)
    for kl, old_kl in zip(KL_ESTIMATORS[::2], KL_ESTIMATORS[1::2], strict=True)
]
OTHERS = ("sm_80", "sm_100", "sm_120", "gfx942")  # beside sm_90
CENTERED = dk.cispo(score_centering=True)
# Tensors of logits that a kernel takes: whether the first is aligned comes before the last three.
TENSORS = {"fused": 3, "row_stats": 1, "row_gradient": 2, "multiply_": 1}
SEVERAL_TILES, ONE_TILE, SMALL, ODD = 151936, 32000, 1000, 50257


def call_fused(
    objective: Objective, dtype: str, vocab: int, extras: bool = False, gradient: bool = True
) -> None:
    logits = torch.zeros(1, vocab, dtype=DTYPES[dtype])
    ids, row = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    if extras:
        objective = replace(objective, kl_coef=0.1, entropy_coef=0.1)
    topk = torch.zeros(1, 20) if objective.needs_topk else None
    rows = Rows(
        target_ids=ids,
        temperatures=None,
        topk_ids=None if topk is None else topk.long(),
        topk_logprobs=topk,
        old_logits=logits if objective.needs_old_logits else None,
    )
    tokens = Tokens(row, row, row, *((row, row) if extras else (None, None)))
    options = Options(temperature=1.0, with_entropy=extras)
    ops.fused(logits, *rows, *tokens, *objective.numbers, *options, gradient, "triton")


def call_stats(dtype: str, vocab: int, entropy: bool, k: int = 1) -> None:
    logits = torch.zeros(1, vocab, dtype=DTYPES[dtype])
    ids = torch.zeros(1, k, dtype=torch.int64)
    targets = Targets(ids, mask=ids[:, 0] != 1 if entropy else None, temperatures=None)
    ops.row_stats(logits, *targets, *Options(1.0, entropy), "triton")


def call_gradient(dtype: str, vocab: int, entropy: bool, k: int = 1) -> None:
    logits = torch.zeros(1, vocab, dtype=DTYPES[dtype])
    ids, row = torch.zeros(1, k, dtype=torch.int64), torch.zeros(1)
    h = row if entropy else None
    coefficients = RowCoefficients(ids, None, row, row, entropy=h, g=ids.float(), h=h)
    ops.row_gradient(logits, *coefficients, torch.ones(()), 1.0, 0.0, "triton")


def call_multiply(dtype: str, vocab: int) -> None:
    ops.multiply_(torch.zeros(1, vocab, dtype=DTYPES[dtype]), torch.ones(()), "triton")


def objectives_for(arch: str) -> list[Objective]:
    """Every one for sm_90. What makes a decision per token adds some scalar instructions to the
    same sweeps: of those, each other GPU compiles its own quarter."""
    every = [*OBJECTIVES.values(), *PENALTIES, *ESTIMATORS, CENTERED]
    if arch not in OTHERS:
        return every
    scalar = [objective for objective in every if not objective.beyond_target]
    whole_row = [objective for objective in every if objective.beyond_target]
    return [*scalar[OTHERS.index(arch) :: len(OTHERS)], *whole_row]


def variants(arch: str) -> list[tuple[Any, tuple]]:
    dcpo = OBJECTIVES["dynamic-clip"]
    calls = [(call_fused, (dcpo, dtype, SEVERAL_TILES, True)) for dtype in DTYPES]
    calls += [(call_fused, (OBJECTIVES["kl"], dtype, SEVERAL_TILES, True)) for dtype in DTYPES]
    calls += [(call_stats, (dtype, SEVERAL_TILES, True)) for dtype in ("bf16", "fp32")]
    calls += [(call_gradient, (dtype, SEVERAL_TILES, True)) for dtype in ("bf16", "fp32")]
    calls += [(call, ("bf16", SEVERAL_TILES, True, 20)) for call in (call_stats, call_gradient)]
    calls += [(call_multiply, (dtype, SEVERAL_TILES)) for dtype in ("bf16", "fp32")]
    calls += [(call_fused, (o, "bf16", SEVERAL_TILES)) for o in objectives_for(arch)]
    calls += [(call_fused, (dcpo, dtype, SEVERAL_TILES)) for dtype in ("fp16", "fp32")]
    calls += [(call_fused, (dcpo, "bf16", vocab)) for vocab in (ONE_TILE, SMALL, 7000, ODD)]
    calls += [(call_fused, (dcpo, "bf16", SEVERAL_TILES, False, False))]
    calls += [(call_stats, ("fp16", vocab, False)) for vocab in (SEVERAL_TILES, SMALL, ODD)]
    calls += [(call_gradient, ("fp16", vocab, False)) for vocab in (SEVERAL_TILES, SMALL, ODD)]
    calls += [(call_multiply, ("fp16", vocab)) for vocab in (SMALL, ODD)]
    return calls


def sweeps_of(sass: str) -> list[str]:
    """The innermost loops: from a label to a branch back to it, with no such pair in between."""
    lines = sass.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    branches = ((re.search(r"BRA.*`\((\.L_x_\d+)\)", line), i) for i, line in enumerate(lines))
    loops = [(labels[b[1]], end) for b, end in branches if b and labels[b[1]] < end]
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    sweeps = ["\n".join(lines[start : end + 1]) for start, end in innermost if end - start > 1]
    assert sweeps
    return sweeps


def usual_path(sweep: str) -> str:
    """Without what a branch in it can jump over: only one tile of a row has the target."""
    lines, kept, label = sweep.splitlines(), [], ""
    for i, line in enumerate(lines):
        if label:
            label = "" if line == label else label
            continue
        kept.append(line)
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch and f"{branch[1]}:" in lines[i:]:
            label = f"{branch[1]}:"
    return "\n".join(kept)


def facts_of(compiled, size: int) -> dict[str, Any]:
    """What the assembler says of a kernel for logits of so many bytes: loads and stores by width,
    float64, registers, bytes of local memory, spills in its sweeps, and the instructions per logit
    of those that load 16 bytes at a time, reading alone and writing too."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *rest, file.name], capture_output=True, text=True).stdout
            for tool, rest in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    operation = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)")
    operations = operation.findall(sass)
    assert numbers and operations

    def count(pattern, operations=operations):
        return sum(bool(re.match(pattern, operation)) for operation in operations)

    issued: dict[str, list[float]] = {"read": [], "write": []}
    sweeps = sweeps_of(sass)
    for sweep in (operation.findall(usual_path(sweep)) for sweep in sweeps):
        if loads := count(r"LDG\b.*\.128$", sweep):
            kind = "write" if count("STG", sweep) else "read"
            issued[kind].append(len(sweep) * size / (16 * loads))

    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "spills": sum(count("LDL|STL", operation.findall(sweep)) for sweep in sweeps),
        "issued": issued,
        "wide_loads": count(r"LDG\b.*\.128$"),
        "other_loads": count(r"LDG\b(?!.*\.128$)"),
        "wide_stores": count(r"STG\b.*\.128$"),
        "other_stores": count(r"STG\b(?!.*\.128$)"),
        "float64": count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*F64") + compiled.asm["ptx"].count(".f64"),
        "instructions": len(operations),
    }


def compile_all(arch: str) -> list[dict[str, Any]]:
    facts = []
    for call, arguments in variants(arch):
        before = set(backend._compiled)
        call(*arguments)
        (key,) = set(backend._compiled) - before or {None}
        if key is None:  # another objective of the same kind
            continue
        shown = [getattr(a, "name", a) for a in arguments]
        if isinstance(arguments[0], Objective) and arguments[0].divergence != "none":
            shown[0] = f"{arguments[0].divergence} penalty {arguments[0].penalty_coef}"
        name, _, _, constants, _ = key
        facts.append(
            {
                "kernel": name,
                "of": shown,
                "writes": call is not call_fused or len(arguments) < 5,
                "aligned": constants[-3 - TENSORS[name]],
                "vectors": constants[-2] * arguments_size(arguments) // (16 * constants[-1]),
                "size": arguments_size(arguments),
                "compiled": backend._compiled[key][0],
            }
        )
    return facts


def arguments_size(arguments: tuple) -> int:
    return next(DTYPES[a].itemsize for a in arguments if isinstance(a, str) and a in DTYPES)


def count_compilations(least: int, most: int) -> dict[str, int]:
    draw = random.Random(0)
    for _ in range(20):
        rows, vocab = draw.randint(1, 99), 8 * draw.randint(least // 8, most // 8)
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=True)
        ids, row = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
        lengths = [draw.randint(0, rows)]
        lengths.append(rows - lengths[0])
        bounds = draw.random(), draw.random()
        for objective in (dk.dcpo(*bounds, 1 + draw.random()), dk.gspo(*bounds)):
            dk.policy_loss(
                *(logits, ids, row, row),
                lengths=lengths,
                objective=objective,
                temperature=0.5 + draw.random(),
                backend="triton",
            ).loss.backward(torch.tensor(draw.random()))
    return {
        name: sum(len(caches[0]) for caches in getattr(kernels, name).device_caches.values())
        for name in TENSORS
    }


if __name__ == "__main__":
    arch, which, *vocabs = sys.argv[1:]
    if which == "count":
        print(json.dumps(count_compilations(*map(int, vocabs))))
        sys.exit()
    if arch == "gfx942":
        torch.version.hip = "6.0"
        gpuless.use("hip", arch, 64)
        entries = compile_all(arch)
        for entry in entries:
            assembly = entry.pop("compiled").asm["amdgcn"]
            entry["float64"] = assembly.count("_f64")
            entry["wide_loads"] = assembly.count("load_dwordx4")
            entry["wide_stores"] = assembly.count("store_dwordx4")
    else:
        gpuless.use("cuda", int(arch.removeprefix("sm_")), 32)
        entries = compile_all(arch)
        for entry in entries:
            entry |= facts_of(entry.pop("compiled"), entry["size"])
    print(json.dumps(entries))
