"""row_gradient, row_gradient_: the write alone, from what row_stats returned and two coefficients
per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.objective import MAX_K
from dcpo_kernels.ops.library import (
    check_places,
    check_scalar,
    check_tensors,
    define,
    targets_per_row,
)
from dcpo_kernels.ops.records import RowCoefficients, replaced, schema_of, unpack

_SCHEMA = (
    f"{schema_of(RowCoefficients)}, Tensor? factor, float temperature, float softcap, str backend"
)


def _run(
    logits: Tensor,
    gradient: Tensor,
    coefficients: RowCoefficients,
    factor: Tensor | None,  # a scalar, read where it lies; None: 1
    temperature: float,
    softcap: float,  # as in Options
    backend: str,
) -> None:
    count, k = logits.shape[:-1].numel(), targets_per_row(logits, coefficients.target_ids)
    if k > MAX_K:
        raise ValueError(f"target_ids has {k} ids per row, a gradient takes up to {MAX_K}")
    check_tensors(logits, coefficients, count, target_ids=count * k, g=count * k)
    if factor is not None:
        check_scalar(logits, factor)
    if logits.numel():
        kernels = backends.kernels(backend)
        kernels.row_gradient(logits, gradient, coefficients, factor, temperature, softcap)


def _launch(logits, *flat):
    coefficients, (factor, temperature, softcap, backend) = unpack(flat, RowCoefficients)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(logits, gradient, coefficients, factor, temperature, softcap, backend)
    return gradient


def _fake(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _launch_in_place(logits, *flat):
    coefficients, (factor, temperature, softcap, backend) = unpack(flat, RowCoefficients)
    check_places(logits)
    _run(logits, logits, coefficients, factor, temperature, softcap, backend)


def _fake_in_place(logits, *_):
    pass


def write_part(
    write: Callable[[Tensor, RowCoefficients], None], logits: Tensor, c: RowCoefficients
) -> None:
    """Where logits are some of a row's columns, and a target of -1 is none of them. write(logits,
    coefficients) overwrites rows with their gradient, and takes each target for a column. Those
    that are none are taken for the first, whose gradient is made apart: in a row with a copy of it,
    which stands for them."""
    pair = logits[..., :1].expand(*logits.shape[:-1], 2).contiguous()
    write(logits, replaced(c, target_ids=c.target_ids.clamp(min=0)))
    write(pair, replaced(c, target_ids=(c.target_ids != 0).to(torch.int64)))
    logits[..., :1] = pair[..., :1]


row_gradient = define(f"row_gradient(Tensor logits, {_SCHEMA}) -> Tensor", _launch, _fake)
row_gradient_ = define(
    f"row_gradient_(Tensor(a!) logits, {_SCHEMA}) -> ()", _launch_in_place, _fake_in_place
)
