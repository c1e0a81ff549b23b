"""From hidden states to a chunk of logits, and back: the matrix products of the linear operators.

A chunk's logits are made, the kernels overwrite them with their gradient, and two more products
take it to the hidden states and to the weight. All products are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.ops.chosen import Chosen, positions
from dcpo_kernels.ops.records import Head, HeadGradients, Wanted

_BLOCK_BYTES = 1 << 20  # of a product that is to stay in the cache until it is added up
_MOVED_BYTES = 1 << 21


def plainly(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Products in the dtypes they are given, which autocast would change, and without a graph."""

    @functools.wraps(launch)
    def run(hidden: Tensor, *rest: Any) -> Any:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return launch(hidden, *rest)

    return run


def gradients_like(
    hidden: Tensor, head: Head, wanted: Wanted, into: Tensor | None
) -> HeadGradients:
    """Allocated, for the fakes."""
    return HeadGradients(
        hidden.new_empty(hidden.shape if wanted.of_hidden else 0),
        head.weight.new_empty(head.weight.shape if wanted.of_weight and into is None else 0),
        head.weight.new_empty(head.weight.shape[0] if wanted.of_bias else 0),
    )


def check_head(hidden: Tensor, head: Head, into: Tensor | None = None) -> None:
    """For who calls an operator: the losses have said it in more words."""
    weight, width = head.weight, hidden.shape[-1]
    wanted = {"weight": (weight, (weight.shape[0], width)), "bias": (head.bias, weight.shape[:1])}
    for name, (x, shape) in wanted.items():
        if x is not None and (x.shape != shape or x.dtype != hidden.dtype):
            raise ValueError(
                f"{name} must be {hidden.dtype} {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
    if into is not None and into.shape != weight.shape:
        raise ValueError(f"into must be {list(weight.shape)}, got {list(into.shape)}")


def logits_like(hidden: Tensor, head: Head) -> Tensor:
    """The shape, dtype and device of all the logits, in the memory of one."""
    shape = (*hidden.shape[:-1], head.weight.shape[0])
    return hidden.new_empty((), dtype=logits_dtype(hidden, head)).expand(shape)


def logits_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    wide = head.float32_logits and hidden.dtype != torch.float64
    return torch.float32 if wide else hidden.dtype


def most_rows(hidden: Tensor, head: Head) -> int:
    """Those whose logits keep to memory_limit, at least one."""
    bytes_per_logit = logits_dtype(hidden, head).itemsize
    if bytes_per_logit > hidden.dtype.itemsize:
        bytes_per_logit += hidden.dtype.itemsize  # their gradient in the dtype of the products
    return max(head.memory_limit // max(head.weight.shape[0] * bytes_per_logit, 1), 1)


def chunks(count: int, hidden: Tensor, head: Head) -> list[slice]:
    """Rows in parts of one size."""
    most = most_rows(hidden, head)
    size = -(-count // max(-(-count // most), 1))
    size = max(min(-(-size // 16) * 16, most), 1)  # products like whole tiles
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def rooms(
    parts: list[slice], hidden: Tensor, head: Head, kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk with memory for its logits: the same for all of them, or that of `kept`."""
    if kept is not None:
        yield from ((part, kept[part]) for part in parts)
        return
    most = max((part.stop - part.start for part in parts), default=0)
    shape = (most, head.weight.shape[0])
    buffer = hidden.new_empty(shape, dtype=logits_dtype(hidden, head))
    yield from ((part, buffer[: part.stop - part.start]) for part in parts)


def _blocks(head: Head, itemsize: int) -> Iterator[slice]:
    """Rows of the weight, so many that their product stays in the cache."""
    vocab, width = head.weight.shape
    size = max(_BLOCK_BYTES // (max(width, 1) * itemsize), 1)
    return (slice(start, min(start + size, vocab)) for start in range(0, vocab, size))


def _sums_in_float32(x: Tensor) -> bool:
    """Whether a product of 16-bit matrices can have a float32 result (torch 2.8, on a GPU)."""
    return x.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()


def logits_of(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """[n, V], rounded once from the product's float32, or not at all."""
    logits, weight, bias = out, head.weight, head.bias
    if logits.dtype == hidden.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=logits)
        return torch.addmm(bias, hidden, weight.t(), out=logits)
    if _sums_in_float32(hidden):
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), logits.dtype, out=logits)
    else:
        wide = hidden.to(logits.dtype)
        for block in _blocks(head, logits.itemsize):
            torch.mm(wide, weight[block].to(logits.dtype).t(), out=logits[:, block])
    return logits if bias is None else logits.add_(bias)


def compact(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The given rows of a chunk at its front, and where each of them was. Rows beyond the front
    move into its gaps, so that no row moves twice and few do: their order is another, but the same
    run after run."""
    count = len(rows)
    inside = int(torch.searchsorted(rows, count))  # those already in the front
    order, free = torch.arange(count), torch.ones(count, dtype=torch.bool)
    free[rows[:inside]] = False
    gaps = free.nonzero().squeeze(1)
    order[gaps] = rows[inside:]
    gaps, moved, order = (
        x.to(logits.device, non_blocking=True) for x in (gaps, rows[inside:], order)
    )
    few = max(_MOVED_BYTES // max(logits[:1].nbytes, 1), 1)  # at a time: they are copied in between
    for gap, row in zip(gaps.split(few), moved.split(few), strict=True):
        logits.index_copy_(0, gap, logits.index_select(0, row))
    return logits[:count], order


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class WeightGradient:
    """The sum of the chunks' products, rounded once to the dtype of the weight.

    Two 16-bit products need no float32 beside them: the second adds up in it what the first has
    left, and rounds that. More of them do, and where a product can't have float32 results (on a
    CPU) each is rounded before it is added.
    """

    def __init__(self, head: Head, parts: list[slice], into: Tensor | None) -> None:
        weight, sums = head.weight, sum_dtype(head.weight.dtype)
        self.head, self.into = head, into
        self.fresh = True  # total holds nothing yet
        self.rounded = False  # the gradient has the total
        if into is not None and into.dtype == sums:
            self.total, self.fresh = into, False
        else:
            few = len(parts) <= (1 if _sums_in_float32(weight) else 2)
            self.total = torch.empty_like(weight, dtype=None if few else sums)
        self.gradient = self.total
        if self.total.dtype != weight.dtype and self.total is not into:
            self.gradient = torch.empty_like(weight)

    def add(self, logits: Tensor, hidden: Tensor, last: bool) -> None:  # [V, n], [n, D]
        """A chunk's product."""
        total = self.total
        if total.dtype == hidden.dtype:
            if self.fresh:
                torch.mm(logits, hidden, out=total)
            else:
                total.addmm_(logits, hidden)
        elif _sums_in_float32(hidden):
            if self.fresh:
                torch.ops.aten.mm.dtype_out(logits, hidden, total.dtype, out=total)
            else:
                torch.ops.aten.addmm.dtype_out(total, logits, hidden, total.dtype, out=total)
        else:
            # The product of a few rows of the weight is still in the cache when it is added.
            self.rounded = last and self.gradient is not total
            for block in _blocks(self.head, hidden.itemsize):
                product = torch.mm(logits[block], hidden)
                if self.fresh:
                    total[block] = product
                else:
                    total[block] += product
                if self.rounded:
                    self.gradient[block] = total[block]
        self.fresh = False

    def result(self) -> Tensor:
        if self.fresh:
            self.total.zero_()
        if self.gradient is not self.total and not self.rounded:
            self.gradient.copy_(self.total)
        if self.into is not None and self.into is not self.total:
            self.into.add_(self.gradient)
        return self.gradient


class Backward:
    """The gradients of hidden states, weight and bias, chunk after chunk."""

    def __init__(
        self,
        hidden: Tensor,  # [n, D], of the chosen rows
        head: Head,
        wanted: Wanted,
        parts: list[slice],
        into: Tensor | None,  # [V, D]: what the weight's gradient is added to
    ) -> None:
        weight = head.weight
        self.hidden, self.head, self.into = hidden, head, into
        self.of_hidden = torch.zeros_like(hidden) if wanted.of_hidden else None
        self.of_bias = None
        if wanted.of_bias:
            self.of_bias = weight.new_zeros(len(weight), dtype=sum_dtype(weight.dtype))
        self.of_weight = None
        if wanted.of_weight or into is not None:
            self.of_weight = WeightGradient(head, parts, into)

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.of_hidden, self.of_weight, self.of_bias))

    def add(self, part: slice, logits: Tensor, has_gradient: Tensor | None) -> None:
        """logits hold the gradient of a chunk's logits. Rows without one cost no product."""
        if not self.wanted:
            return
        hidden, order = self.hidden[part], None
        rows = None if has_gradient is None else positions(has_gradient)
        if rows is not None:
            if not len(rows):
                return
            logits, order = compact(logits, rows)
            hidden = hidden.index_select(0, order)
        logits = logits.to(hidden.dtype)
        if self.of_hidden is not None:
            if order is None:
                torch.mm(logits, self.head.weight, out=self.of_hidden[part])
            else:
                of_rows = torch.mm(logits, self.head.weight)
                self.of_hidden[part].index_copy_(0, order, of_rows)
        if self.of_bias is not None:
            self.of_bias += logits.sum(0, dtype=self.of_bias.dtype)
        if self.of_weight is not None:
            self.of_weight.add(logits.t(), hidden, last=part.stop == len(self.hidden))

    def gradients(self, chosen: Chosen, like: Tensor) -> HeadGradients:
        """Of all the rows; `like` are their hidden states."""
        weight, of_hidden = self.head.weight, self.of_hidden
        nothing = weight.new_empty(0)
        of_weight = None if self.of_weight is None else self.of_weight.result()
        if of_hidden is not None:
            whole = of_hidden
            if chosen.rows is not None:
                whole = like.new_zeros(chosen.all_rows, like.shape[-1])
                whole.index_copy_(0, chosen.rows, of_hidden)
            of_hidden = whole.view(like.shape)
        return HeadGradients(
            nothing if of_hidden is None else of_hidden,
            nothing if of_weight is None or self.into is not None else of_weight,
            nothing if self.of_bias is None else self.of_bias.to(weight.dtype),
        )
