"""The rows of a case: our backends, the plain formula compiled and eager, the peers, the copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.backends import cuda
from dcpo_kernels.bench import peers
from dcpo_kernels.bench.calls import Call, Copy, Implementation
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator

BACKENDS = ("cpu", "cuda", "triton", "reference", "compile", "eager")
# `fused` launched otherwise than by the backend's table: (backend, argument of its `fused`, value).
VARIANTS = {
    "cuda-streaming": ("cuda", "cluster", 0),
    **{f"cuda-cluster-{n}": ("cuda", "cluster", n) for n in (1, 2, 4, 8)},
    **{f"cuda-polynomial-{n}": ("cuda", "polynomial", n) for n in (1, 2)},
    **{f"triton-{n}-threads": ("triton", "threads", n) for n in (128, 256, 512)},
}


def implementations(
    operator: Operator, inputs: Inputs, names: Sequence[str], peer_names: Sequence[str]
) -> list[Implementation]:
    rows = []
    for name in names:
        if name == "compile":
            make = partial(_plain, operator, inputs, compiled=True)
            rows.append(Implementation("torch.compile", "plain", make))
        elif name == "eager":
            make = partial(_plain, operator, inputs, compiled=False)
            rows.append(Implementation("eager", "plain", make))
        elif name in VARIANTS:
            rows += _variant(operator, inputs, name)
        else:
            rows += _ours(operator, inputs, name)
    rows += [peers.implementation(peers.PEERS[name], operator, inputs) for name in peer_names]
    copied = 2 * inputs.logits.nbytes
    return [*rows, Implementation("copy", "copy", lambda: Copy(inputs.logits), traffic=copied)]


def _ours(operator: Operator, inputs: Inputs, backend: str) -> list[Implementation]:
    reason = backends.unavailable(backend, inputs.case.device)
    if backend == "triton" and inputs.case.device == "cpu":
        reason = reason or "its interpreter is no measure of anything"
    kernels = backend != "reference"
    kind = "ours" if kernels else "plain"
    traffic = operator.minimum_bytes(inputs) if kernels else None  # which they are built for

    def row(name: str, inplace: bool) -> Implementation:
        function = operator.ours(inputs, backend, inplace)
        make = partial(Call, operator, inputs, function, overwrites=inplace)
        note = _kernel(operator, inputs) if backend == "cuda" else ""
        return Implementation(name, kind, make, note, traffic=traffic)

    if reason:
        return [Implementation(backend, kind, None, reason, traffic=traffic)]
    rows = [row(backend, False)]
    if operator.backward and kernels:
        rows.insert(0, row(f"{backend}, in place", True))
    return rows


def _variant(operator: Operator, inputs: Inputs, name: str) -> list[Implementation]:
    if operator.name != "fused" or inputs.objective.by_response:
        return []  # another kernel is launched
    backend, argument, value = VARIANTS[name]
    plain = _ours(operator, inputs, backend)[0]
    if plain.make is None:
        return [replace(plain, name=name)]
    function, kernels = operator.ours(inputs, backend, True), backends.kernels(backend)
    changed = partial(kernels.fused, **{argument: value})

    def run(logits: Tensor) -> Tensor:
        with patch.object(kernels, "fused", changed):
            return function(logits)

    cluster = value if argument == "cluster" else cuda.BY_TABLE
    note = _kernel(operator, inputs, cluster) if backend == "cuda" else ""
    make = partial(Call, operator, inputs, run, overwrites=True)
    return [replace(plain, name=f"{name}, in place", make=make, note=note)]


def _kernel(operator: Operator, inputs: Inputs, cluster: int = cuda.BY_TABLE) -> str:
    """What the CUDA backend does with a row, where more than one of its kernels could be asked."""
    objective, logits = inputs.objective, inputs.logits
    if operator.name != "fused" or objective.by_response:
        return ""
    if objective.beyond_target:
        return ""
    return cuda.plan(logits.shape[-1], logits.itemsize, logits.get_device(), cluster)


def _plain(operator: Operator, inputs: Inputs, compiled: bool) -> Call:
    function = operator.plain(inputs)
    if compiled:
        torch.compiler.reset()
        # Static shapes, the best case: the compiler may use every size.
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return Call(operator, inputs, function)
