"""The rows of a case: our backends, the plain formula compiled and eager, the peers, the copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.bench import peers
from dcpo_kernels.bench.calls import Call, Copy, Implementation
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator

BACKENDS = ("cpu", "cuda", "triton", "reference", "compile", "eager")
# `fused` launched otherwise than by the backend's table: (backend, argument of its `fused` or
# variable of its module, value).
VARIANTS = {
    "cuda-streaming": ("cuda", "cluster", 0),
    **{f"cuda-cluster-{n}": ("cuda", "cluster", n) for n in (1, 2, 4, 8)},
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
        return Implementation(name, kind, make, traffic=traffic)

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
    changed = {argument: value}
    if not hasattr(kernels, argument):
        changed = {"fused": partial(kernels.fused, **changed)}

    def run(logits: Tensor) -> Tensor:
        with patch.multiple(kernels, **changed):
            return function(logits)

    note = "streaming where a row does not fit" if argument == "cluster" and value else ""
    make = partial(Call, operator, inputs, run, overwrites=True)
    return [replace(plain, name=f"{name}, in place", make=make, note=note)]


def _plain(operator: Operator, inputs: Inputs, compiled: bool) -> Call:
    function = operator.plain(inputs)
    if compiled:
        torch.compiler.reset()
        # Static shapes, the best case: the compiler may use every size.
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return Call(operator, inputs, function)
