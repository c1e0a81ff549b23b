"""verl's logprobs_from_logits: flash-attn's cross-entropy where that is installed, else PyTorch, a
row at a time."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.peers import Peer, from_logprobs, lacks_nothing


def call(operator: Operator, inputs: Inputs) -> Call:
    from verl.utils import torch_functional

    ids = inputs.target_ids.clamp(min=0)
    flash = getattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)

    def logprobs(logits: Tensor) -> Tensor:
        return torch_functional.logprobs_from_logits(logits, ids, inplace_backward=True)

    return from_logprobs(operator, inputs, logprobs, overwrites=flash)


PEER = Peer(
    name="verl",
    distribution="verl",
    devices=("cpu", "cuda"),
    lacks=lacks_nothing,
    call=call,
)
