"""The compiled module's CUDA kernels. Arguments were checked and results allocated by the
operators; kernels are launched on torch's current stream of the logits' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.backends import native
from dcpo_kernels.backends.layout import row_count, row_strides

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


def fused(logits: Tensor, *rest: Any) -> None:
    arguments = native.fused_arguments(logits, *rest)
    _C.cuda_fused(**arguments, **_where(logits), cluster=cluster)


def row_stats(logits: Tensor, *rest: Any) -> None:
    _C.cuda_stats(**native.row_stats_arguments(logits, *rest), **_where(logits))


def row_gradient(logits: Tensor, *rest: Any) -> None:
    _C.cuda_gradient(**native.row_gradient_arguments(logits, *rest), **_where(logits))


def token_weights(grouping: Any, values: Any, responses: Any, spread: Any) -> None:
    arguments = native.token_weights_arguments(grouping, values, responses, spread)
    _C.cuda_token_weights(**arguments, **_where(responses.weights))


def decide(read: Any, *records: Any) -> None:
    _C.cuda_decide(**native.decide_arguments(read, *records), **_where(read.logprobs))


def finish(results: Any, *records: Any) -> None:
    _C.cuda_finish(**native.finish_arguments(results, *records), **_where(results.token_loss))


def scale(x: Tensor, scale: Tensor) -> None:
    dense = x.is_contiguous()
    _C.cuda_scale(
        rows=1 if dense else row_count(x),
        vocab=x.numel() if dense else x.shape[-1],
        dtype=native.DTYPES[x.dtype],
        x=x.data_ptr(),
        strides=(1, 0, 0) if dense else row_strides(x),
        scale=scale.data_ptr(),
        **_where(x),
    )
