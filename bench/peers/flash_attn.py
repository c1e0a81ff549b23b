"""flash-attn's Triton cross-entropy as log-probs."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.peers import Peer, from_logprobs, lacks_nothing, read_read_write


def call(operator: Operator, inputs: Inputs) -> Call:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    shape, ids = inputs.target_ids.shape, inputs.target_ids.flatten()  # -100: ignored

    def logprobs(logits: Tensor) -> Tensor:
        rows = logits.view(-1, inputs.case.vocab)
        return -cross_entropy_loss(rows, ids, inplace_backward=True)[0].view(shape)

    return from_logprobs(operator, inputs, logprobs, overwrites=True)


PEER = Peer(
    name="flash-attn",
    distribution="flash-attn",
    devices=("cuda",),
    lacks=lacks_nothing,
    call=call,
    note="in place",
    traffic=read_read_write,
)
