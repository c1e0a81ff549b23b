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


def check_ids(ids: Tensor, counts: Tensor | None, vocab: int, name: str) -> None:
    """IndexError for an id outside the vocabulary in a row that counts.

    ids [N] or [N, K], counts [N], nonzero where the row counts. On a GPU looking would mean waiting
    for it: there the kernels give such a row a loss of NaN, and only DCPO_KERNELS_CHECK=1 looks.
    """
    if torch.compiler.is_compiling():  # the reference, which is traced whole
        return
    if ids.device.type != "cpu" and os.environ.get("DCPO_KERNELS_CHECK") != "1":
        return
    bad = (ids < 0) | (ids >= vocab)
    if counts is not None:
        bad &= (counts != 0).view(-1, *[1] * (ids.dim() - 1))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{name}{at} is {int(ids[tuple(at)])}, outside the vocabulary of {vocab} (row {at[0]})"
        )
