"""The compiled module's CUDA kernels. Arguments were checked and results allocated by the
operators; kernels are launched on torch's current stream of the logits' device."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels.backends import native
from dcpo_kernels.backends.layout import row_count, row_strides
from dcpo_kernels.backends.native import _DTYPES, _address, _objective

_C = native._C

# How many blocks hold a row of `fused`: -1 as the table in csrc/cuda/plan.h says, 0 the streaming
# kernel. For tests and for measuring the table.
cluster = -1


def unavailable(device: str = "cuda") -> str:
    if _C is None:
        return native.unavailable()
    if not _C.cuda:
        return "the compiled module was built without CUDA (no nvcc then); DCPO_CUDA=ON insists"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = _C.cuda_why_not(torch.cuda.current_device())
    if reason:
        major, minor = torch.cuda.get_device_capability()
        return f"built for {_C.cuda_archs}, this GPU is sm_{major}{minor}: {reason}"
    return ""


def _where(x: Tensor) -> dict[str, int]:
    """Device and stream of a launch."""
    index = x.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


def _shape(logits: Tensor, temperature: float) -> dict[str, object]:
    return {
        "rows": row_count(logits),
        "vocab": logits.shape[-1],
        "dtype": _DTYPES[logits.dtype],
        "temperature": temperature,
        "logits": logits.data_ptr(),
        "logits_strides": row_strides(logits),
        **_where(logits),
    }


def fused(
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
) -> None:
    _C.cuda_fused(
        **_shape(logits, temperature),
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
        cluster=cluster,
    )


def row_stats(
    logits: Tensor,
    target_ids: Tensor,
    counts: Tensor | None,
    temperature: float,
    logprobs: Tensor,
    entropy: Tensor,  # [0]: not wanted
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    _C.cuda_stats(
        **_shape(logits, temperature),
        target_ids=_address(target_ids),
        counts=_address(counts),
        logprobs=_address(logprobs),
        entropy=_address(entropy),
        row_max=_address(row_max),
        log_sum=_address(log_sum),
    )


def row_gradient(
    logits: Tensor,
    gradient: Tensor,  # like logits, or logits itself
    target_ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    temperature: float,
) -> None:
    _C.cuda_gradient(
        **_shape(logits, temperature),
        gradient=_address(gradient),
        gradient_strides=row_strides(gradient),
        target_ids=_address(target_ids),
        row_max=_address(row_max),
        log_sum=_address(log_sum),
        entropy=_address(entropy),
        g=_address(g),
        h=_address(h),
    )


def scale(x: Tensor, scale: Tensor) -> None:
    dense = x.is_contiguous()
    _C.cuda_scale(
        rows=1 if dense else row_count(x),
        vocab=x.numel() if dense else x.shape[-1],
        dtype=_DTYPES[x.dtype],
        x=x.data_ptr(),
        strides=(1, 0, 0) if dense else row_strides(x),
        scale=scale.data_ptr(),
        **_where(x),
    )
