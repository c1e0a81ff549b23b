"""trl's selective_log_softmax_and_entropy: log-probs and entropy in one Triton kernel, or in
PyTorch where that can't run."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.peers import Peer, from_logprobs, lacks_nothing, read_read_write


def call(operator: Operator, inputs: Inputs) -> Call:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    ids = inputs.target_ids.clamp(min=0)

    def logprobs(logits: Tensor) -> Tensor:
        return selective_log_softmax_and_entropy(
            logits, ids, entropy_requires_grad=False, row_mask=inputs.mask
        )[0]

    return from_logprobs(operator, inputs, logprobs)


PEER = Peer(
    name="trl",
    distribution="trl",
    devices=("cpu", "cuda"),
    lacks=lacks_nothing,
    call=call,
    note="computes the entropy too",
    traffic=read_read_write,
)
