"""verl's logprobs_from_logits: flash-attn's cross-entropy where that is installed, else PyTorch, a
row at a time."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.bench.peers import of_logprobs


def logprobs(inputs: Inputs) -> tuple[Function, bool]:
    from verl.utils import torch_functional

    ids = inputs.target_ids.clamp(min=0)
    flash = getattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)

    def run(logits: Tensor) -> Tensor:
        return torch_functional.logprobs_from_logits(logits, ids, inplace_backward=True)

    return run, flash


PEER = of_logprobs("verl", ("cpu", "cuda"), logprobs, traffic=None)
