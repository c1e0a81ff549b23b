"""The compiled module's CUDA kernels. Arguments were checked and results allocated by the
operators; kernels are launched on torch's current stream of the logits' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.backends import _compiled
from dcpo_kernels.backends._compiled import C


def unavailable(device: str = "cuda") -> str:
    if C is None:
        return _compiled.missing
    if not C.cuda:
        return "the compiled module was built without CUDA (no nvcc then); DCPO_CUDA=ON insists"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = C.cuda_why_not(torch.cuda.current_device())
    if reason:
        major, minor = torch.cuda.get_device_capability()
        return f"built for {C.cuda_archs}, this GPU is sm_{major}{minor}: {reason}"
    return ""


def _where(x: Tensor) -> dict[str, int]:
    """Device and stream of a launch."""
    index = x.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


BY_TABLE = -1  # csrc/cuda/plan.h


def fused(
    logits: Tensor, *records: Any, cluster: int = BY_TABLE, polynomial: int = BY_TABLE
) -> None:
    """cluster: so many blocks hold a row; 0: it is streamed. polynomial: so many quarters of the
    exponentials of a bf16 gradient are multiply-adds, 0 to 2."""
    arguments = _compiled.fused_arguments(logits, *records)
    C.cuda_fused(**arguments, **_where(logits), cluster=cluster, polynomial=polynomial)


def plan(vocab: int, itemsize: int, device: int, cluster: int = BY_TABLE) -> str:
    """What `fused` with a gradient does with rows that lie on 16 bytes."""
    if vocab * itemsize % 16:
        return "streams rows that can't all begin on 16 bytes"
    blocks = C.cuda_plan(vocab * itemsize, device, cluster)["cluster"]
    return f"holds a row in {blocks} blocks" if blocks else "streams rows"


def row_stats(logits: Tensor, *records: Any) -> None:
    C.cuda_stats(**_compiled.row_stats_arguments(logits, *records), **_where(logits))


def row_gradient(logits: Tensor, *records: Any) -> None:
    C.cuda_gradient(**_compiled.row_gradient_arguments(logits, *records), **_where(logits))


def token_weights(grouping: Any, values: Any, responses: Any, spread: Any) -> None:
    arguments = _compiled.token_weights_arguments(grouping, values, responses, spread)
    C.cuda_token_weights(**arguments, **_where(responses.weights))


def decide(read: Any, *records: Any) -> None:
    C.cuda_decide(**_compiled.decide_arguments(read, *records), **_where(read.logprobs))


def finish(results: Any, *records: Any) -> None:
    C.cuda_finish(**_compiled.finish_arguments(results, *records), **_where(results.token_loss))


def multiply_(x: Tensor, factor: Tensor) -> None:
    C.cuda_multiply(
        **_compiled.multiply_arguments(x.view(1, -1) if x.is_contiguous() else x, factor),
        **_where(x),
    )
