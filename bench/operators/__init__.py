"""What `dcpo bench` can measure. Every module here defines an OPERATOR."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs

# Logits, in the layout of Inputs, to what the operator returns.
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operator:
    """An operator by what it computes, its floor in bytes, and its implementations."""

    name: str
    title: str
    takes_objective: bool
    backward: bool  # differentiate
    upstream: bool  # the value is one per token, and inputs.upstream its gradient
    minimum_bytes: Callable[[Inputs], int]  # of memory traffic
    ours: Callable[[Inputs, str, bool], Function]  # (inputs, backend, inplace)
    plain: Callable[[Inputs], Function]  # the formula in PyTorch, as one would write it
    only_ours: bool = False  # no peer has it


def operators() -> dict[str, Operator]:
    found = [
        importlib.import_module(f"{__name__}.{module.name}").OPERATOR
        for module in pkgutil.iter_modules(__path__)
    ]
    return {operator.name: operator for operator in found}
