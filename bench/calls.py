"""One implementation on one set of inputs, as something to call again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, Operator


class Call:
    """An operator's value, and its gradient where it has one.

    overwrites: the call leaves the gradient where the logits were. It gets logits of its own, which
        `restore` puts back, outside of what is timed.
    rows: from the gradient of the logits passed to that of inputs.logits, for a peer whose layout
        has more rows.
    """

    def __init__(
        self,
        operator: Operator,
        inputs: Inputs,
        function: Function,
        *,
        overwrites: bool = False,
        logits: Tensor | None = None,
        rows: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        self.operator, self.inputs, self.function = operator, inputs, function
        self.overwrites, self.rows = overwrites, rows
        self.source = inputs.logits if logits is None else logits
        self.logits = self.source.clone() if overwrites else self.source

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def elsewhere(self) -> Call:
        """The same on a copy of the logits."""
        logits = self.source if self.overwrites else self.source.clone()
        options = {"overwrites": self.overwrites, "logits": logits, "rows": self.rows}
        return Call(self.operator, self.inputs, self.function, **options)

    def restore(self) -> None:
        if self.overwrites:
            self.logits.copy_(self.source)

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        if not self.operator.backward:
            with torch.no_grad():
                return self.function(self.logits), None
        leaf = self.logits.detach().requires_grad_()
        value = self.function(_Output.apply(leaf) if self.overwrites else leaf)
        upstream = self.inputs.upstream if self.operator.upstream else None
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        return value.detach(), self.rows(gradient)


class _Output(torch.autograd.Function):
    """The leaf's memory like a model's output: no leaf and no view of one, so that it may be
    overwritten."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Copy:
    """The ceiling: reads the logits and writes them once, into memory that is already there."""

    def __init__(self, logits: Tensor) -> None:
        self.source, self.target = logits, torch.empty_like(logits)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes + self.target.nbytes

    def elsewhere(self) -> Copy:
        return Copy(self.source.clone())

    def restore(self) -> None:
        pass

    def __call__(self) -> None:
        self.target.copy_(self.source)


@dataclass(frozen=True)
class Implementation:
    """A row of the table."""

    name: str
    kind: str  # "ours", "plain", "copy" or "peer"
    make: Callable[[], Call | Copy] | None  # None: nothing to time, and `note` says why
    note: str = ""
    version: str = ""
    traffic: int | None = None  # bytes, where a model of the implementation says
