"""row_gradient, row_gradient_: the write alone, from what row_stats returned and two coefficients
per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops.library import check_places, check_scalar, check_tensors, define
from dcpo_kernels.ops.records import schema_of, unpack


class RowCoefficients(NamedTuple):
    """dx_j = factor/T [g (1[j = y] - p_j) - h p_j (log p_j + H)]. [N] float32, float64 for float64
    logits. A row with g = h = 0 is not read, its gradient is 0."""

    target_ids: Tensor  # [N] int64
    temperatures: Tensor | None  # None: the number `temperature` for all of them
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None  # None where h is
    g: Tensor
    h: Tensor | None  # None: no entropy term


_SCHEMA = f"{schema_of(RowCoefficients)}, Tensor? factor, float temperature, str backend"


def _run(
    logits: Tensor,
    gradient: Tensor,
    coefficients: RowCoefficients,
    factor: Tensor | None,  # a scalar, read where it lies; None: 1
    temperature: float,
    backend: str,
) -> None:
    check_tensors(logits, coefficients, logits.shape[:-1].numel())
    if factor is not None:
        check_scalar(logits, factor)
    if logits.numel():
        kernels = backends.kernels(backend)
        kernels.row_gradient(logits, gradient, coefficients, factor, temperature)


def _launch(logits, *flat):
    coefficients, (factor, temperature, backend) = unpack(flat, RowCoefficients)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(logits, gradient, coefficients, factor, temperature, backend)
    return gradient


def _fake(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _launch_in_place(logits, *flat):
    coefficients, (factor, temperature, backend) = unpack(flat, RowCoefficients)
    check_places(logits)
    _run(logits, logits, coefficients, factor, temperature, backend)


def _fake_in_place(logits, *_):
    pass


row_gradient = define(f"row_gradient(Tensor logits, {_SCHEMA}) -> Tensor", _launch, _fake)
row_gradient_ = define(
    f"row_gradient_(Tensor(a!) logits, {_SCHEMA}) -> ()", _launch_in_place, _fake_in_place
)
