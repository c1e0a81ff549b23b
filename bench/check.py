"""The correctness gate: nothing is timed before its value and gradient agree with the float64
reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.records import Agreement

OUR_VALUE_TOLERANCE = 2e-5  # of 1 + |value|
VALUE_TOLERANCE = 2e-4  # PyTorch's own log_softmax is off by 6e-5 where V is 150,000
GRADIENT_TOLERANCE = 5  # times that of the value; the rounding to the logits' dtype comes on top
FLOOR = 1e-4  # of the row's largest entry: smaller ones are compared with this
ROWS = 64  # compared at a time


@dataclass(frozen=True)
class Expected:
    value: Tensor  # float64: a scalar, or one per token
    gradient: Tensor | None = None  # float32, like the logits
    slope: Tensor | None = None  # [N] float64: |d value / d log-prob| of each row


def expected(operator: Operator, inputs: Inputs) -> Expected:
    """What the reference backend makes of the same inputs in float64."""
    if not operator.backward:
        return Expected(torch.cat([_reference(operator, chunk)[0] for _, chunk in inputs.chunks()]))
    values, slopes = [], []
    gradient = torch.empty_like(inputs.logits, dtype=torch.float32)
    for at, chunk in inputs.chunks():
        value, part = _reference(operator, chunk)
        values.append(value)
        slopes.append(_slope(chunk.logits.flatten(0, -2), part.flatten(0, -2)))
        gradient[at] = part
    value = torch.cat(values) if operator.upstream else torch.stack(values).sum()
    return Expected(value, gradient, torch.cat(slopes))


def _reference(operator: Operator, chunk: Inputs) -> tuple[Tensor, Tensor | None]:
    return Call(operator, chunk, operator.ours(chunk, "reference", False))()


def _slope(logits: Tensor, gradient: Tensor) -> Tensor:
    """[N]: |g| from dx_j = -g p_j, j the largest entry but one; the largest is the target's,
    g (1 - p)."""
    if logits.shape[-1] < 2:
        return torch.zeros_like(gradient[:, 0])
    top = gradient.abs().topk(2, dim=-1)
    log_p = logits.gather(-1, top.indices[:, 1:])[:, 0] - logits.logsumexp(-1)
    return top.values[:, 1] / log_p.exp()


def compare(
    value: Tensor,
    gradient: Tensor | None,
    want: Expected,
    mask: Tensor | None = None,
    tolerance: float = VALUE_TOLERANCE,
) -> Agreement:
    """mask: tokens whose own value matters; their gradients always do.

    An entry's error is relative to the entry. Two errors are allowed for: the rounding of a
    subnormal, and at the target that of 1 - p, whose relative error grows without bound as p nears
    1, for the same error of the log-prob.
    """
    if mask is not None and value.dim() > 0:
        value = torch.where(mask, value, 0.0)
    value_error = ((value.double() - want.value).abs() / (1 + want.value.abs())).max().item()
    if want.gradient is None:
        return Agreement(value_error=_finite(value_error), value_tolerance=tolerance)
    assert gradient is not None and want.slope is not None
    info = torch.finfo(gradient.dtype)
    got, rows = gradient.flatten(0, -2), want.gradient.flatten(0, -2)
    error = torch.zeros((), dtype=torch.float64, device=got.device)
    for begin in range(0, len(rows), ROWS):
        at = slice(begin, begin + ROWS)
        right = rows[at].double()
        off = (got[at].double() - right).abs() - info.smallest_normal * info.eps
        largest = right.abs().max(-1, keepdim=True)
        off.scatter_add_(-1, largest.indices, -tolerance * want.slope[at, None])
        size = right.abs() + FLOOR * largest.values
        # In a row that must be 0 any other entry is an infinite error.
        error = torch.maximum(error, (off.clamp(min=0) / size.clamp(min=1e-300)).max())
    return Agreement(
        value_error=_finite(value_error),
        value_tolerance=tolerance,
        gradient_error=_finite(error.item()),
        gradient_tolerance=info.eps + GRADIENT_TOLERANCE * tolerance,
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
