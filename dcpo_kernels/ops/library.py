"""The operator library, and what every operator does with its arguments before it launches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "dcpo_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator for CPU and CUDA tensors and return what calls it.

    needs_fixed_stride_order: without it Inductor (torch 2.6) hands over tensors with strides of its
        own choice.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, launch, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# Of the tensors that are not float32 (float64 where the logits are).
_DTYPES = {
    "target_ids": (torch.int64,),
    "topk_ids": (torch.int64,),
    "mask": (torch.bool, torch.uint8),
    "lengths": (torch.int64,),
    "response_lengths": (torch.int64,),
    "offsets": (torch.int64,),
    "clipped": (torch.int8,),
    "has_gradient": (torch.int8,),
}


def check_tensors(like: Tensor, record: Any, count: int, **counts: int) -> None:
    """Each tensor of a record has its dtype, `count` elements (or those given by its name), and
    lies contiguous on the device of `like`: the kernels get nothing but addresses. The losses see
    to it; this is for who calls an operator."""
    floats = (torch.float32, torch.float64) if like.dtype == torch.float64 else (torch.float32,)
    for name, x in zip(record._fields, record, strict=True):
        if not isinstance(x, Tensor):
            continue
        if x.dtype not in _DTYPES.get(name, floats):
            raise TypeError(f"{name} must be {_DTYPES.get(name, floats)[0]}, got {x.dtype}")
        if x.numel() != counts.get(name, count) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and hold {counts.get(name, count)} values, got shape "
                f"{list(x.shape)} with strides {list(x.stride())}"
            )
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, the other tensors are on {like.device}")


def check_scalar(like: Tensor, factor: Tensor) -> None:
    if factor.numel() != 1 or not factor.is_floating_point() or factor.device != like.device:
        raise ValueError(
            f"factor must be one float on {like.device}, got {factor.dtype} of shape "
            f"{list(factor.shape)} on {factor.device}"
        )


def check_places(logits: Tensor) -> None:
    """ValueError where two rows of logits share memory, and so can't both be overwritten."""
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"inplace=True needs logits with a place for each row, got strides "
                f"{list(logits.stride())}"
            )
        reach += stride * (size - 1)


def check_distinct(name: str, ids: Tensor, read: Tensor) -> None:
    """ValueError for an id that a row [.., K] has twice: its probability would count twice. Looked
    at where check_ids looks."""
    if ids.device.type != "cpu" and os.environ.get("DCPO_KERNELS_CHECK") != "1":
        return
    if not ids.numel():
        return
    in_order = ids.view(read.numel(), -1).sort(-1).values
    twice = (in_order.diff(dim=-1) == 0) & (read.view(-1, 1) != 0)
    if twice.any():
        row, k = twice.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}] has the id {int(in_order[row, k])} more than once")


def targets_per_row(logits: Tensor, target_ids: Tensor) -> int:
    return target_ids.shape[-1] if target_ids.dim() == logits.dim() else 1


def check_ids(name: str, ids: Tensor, logits: Tensor, read: Tensor | None) -> None:
    """IndexError for an id outside the vocabulary in a row that is read.

    ids [N] or [N, K]; read [N], nonzero where the row is read. On a GPU looking would mean waiting
    for it: there the kernels give such a row a loss of NaN, and only DCPO_KERNELS_CHECK=1 looks.
    """
    vocab = logits.shape[-1]
    if ids.device.type != "cpu" and os.environ.get("DCPO_KERNELS_CHECK") != "1":
        return
    if not ids.numel():
        return
    lowest, highest = torch.aminmax(ids)
    if lowest.item() >= 0 and highest.item() < vocab:
        return
    bad = ((ids < 0) | (ids >= vocab)).view(logits.shape[:-1].numel(), -1)
    if read is not None:
        bad = bad & (read.view(-1, 1) != 0)
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        at = [row, k] if bad.shape[1] > 1 else [row]
        raise IndexError(
            f"{name}{at} is {int(ids.view(bad.shape)[row, k])}, outside the vocabulary of {vocab} "
            f"(row {row})"
        )
