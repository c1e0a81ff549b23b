"""The compiled module's CPU kernels. Arguments were checked and results allocated by the
operators."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.backends.layout import row_count, row_strides

_reason = ""
_C: Any = None
try:
    _C = importlib.import_module("dcpo_kernels._C")
except ImportError as error:  # a source tree that was never built, or a module for another Python
    _reason = f"the compiled module is missing ({error}); `pip install .` builds it"

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

if _C is not None and os.environ.get("DCPO_KERNELS_CPU_ISA"):
    _C.cpu_use_isa(os.environ["DCPO_KERNELS_CPU_ISA"])


def unavailable(device: str = "cpu") -> str:
    return _reason


def _address(x: Tensor | None) -> int:
    return x.data_ptr() if x is not None and x.numel() else 0


def _rows(logits: Tensor, temperature: float) -> dict[str, Any]:
    return {
        "rows": row_count(logits),
        "vocab": logits.shape[-1],
        "dtype": DTYPES[logits.dtype],
        "temperature": temperature,
        "logits": logits.data_ptr(),
        "logits_strides": row_strides(logits),
    }


@functools.lru_cache(maxsize=64)
def _objective(*arguments: float):
    return _C.Objective(*arguments)


def fused_arguments(
    logits: Tensor,
    gradient: Tensor | None,  # like logits, or logits itself; None: read and decide only
    target_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    old_logits: Tensor | None,
    objective: list[float],  # objectives.kernel_arguments
    temperature: float,
    skip_zero_advantage: bool,
    token_loss: Tensor,
    logprobs: Tensor,
    entropy: Tensor,  # [0]: not wanted
    ratio: Tensor,
    clipped: Tensor,
) -> dict[str, Any]:
    """What csrc/bind_rows.h takes, on a CPU and on a GPU, but for where to run."""
    return dict(
        **_rows(logits, temperature),
        gradient=_address(gradient),
        gradient_strides=row_strides(gradient if gradient is not None else logits),
        target_ids=_address(target_ids),
        old_logprobs=_address(old_logprobs),
        advantages=_address(advantages),
        weights=_address(weights),
        ref_logprobs=_address(ref_logprobs),
        importance_weights=_address(importance_weights),
        topk_ids=_address(topk_ids),
        topk_logprobs=_address(topk_logprobs),
        k=0 if topk_ids is None else topk_ids.shape[1],
        old_logits=_address(old_logits),
        old_logits_strides=row_strides(old_logits if old_logits is not None else logits),
        objective=_objective(*objective),
        skip_zero_advantage=skip_zero_advantage,
        token_loss=_address(token_loss),
        logprobs=_address(logprobs),
        entropy=_address(entropy),
        ratio=_address(ratio),
        clipped=_address(clipped),
    )


def row_stats_arguments(
    logits: Tensor,
    target_ids: Tensor,
    counts: Tensor | None,
    temperature: float,
    logprobs: Tensor,
    entropy: Tensor,  # [0]: not wanted
    row_max: Tensor,
    log_sum: Tensor,
) -> dict[str, Any]:
    return dict(
        **_rows(logits, temperature),
        target_ids=_address(target_ids),
        counts=_address(counts),
        logprobs=_address(logprobs),
        entropy=_address(entropy),
        row_max=_address(row_max),
        log_sum=_address(log_sum),
    )


def row_gradient_arguments(
    logits: Tensor,
    gradient: Tensor,  # like logits, or logits itself
    target_ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    temperature: float,
) -> dict[str, Any]:
    return dict(
        **_rows(logits, temperature),
        gradient=_address(gradient),
        gradient_strides=row_strides(gradient),
        target_ids=_address(target_ids),
        row_max=_address(row_max),
        log_sum=_address(log_sum),
        entropy=_address(entropy),
        g=_address(g),
        h=_address(h),
    )


def _threads() -> dict[str, int]:
    return {"threads": torch.get_num_threads()}


def fused(*arguments: Any) -> None:
    _C.cpu_fused(**fused_arguments(*arguments), **_threads())


def row_stats(*arguments: Any) -> None:
    _C.cpu_stats(**row_stats_arguments(*arguments), **_threads())


def row_gradient(*arguments: Any) -> None:
    _C.cpu_gradient(**row_gradient_arguments(*arguments), **_threads())


def scale(x: Tensor, scale: Tensor) -> None:
    _C.cpu_multiply(
        rows=row_count(x),
        vocab=x.shape[-1],
        dtype=DTYPES[x.dtype],
        x=x.data_ptr(),
        strides=row_strides(x),
        factor=scale.data_ptr(),
        **_threads(),
    )
