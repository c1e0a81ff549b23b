"""quack's cross_entropy as log-probs: CuTe DSL, a row kept on chip by a cluster of blocks."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.peers import Peer, from_logprobs, lacks_nothing, read_read_write


def call(operator: Operator, inputs: Inputs) -> Call:
    from quack.cross_entropy import cross_entropy

    shape, ids = inputs.target_ids.shape, inputs.target_ids.flatten()  # -100: ignored

    def logprobs(logits: Tensor) -> Tensor:
        rows = logits.view(-1, inputs.case.vocab)
        return -cross_entropy(rows, ids, reduction="none", inplace_backward=True).view(shape)

    return from_logprobs(operator, inputs, logprobs, overwrites=True)


PEER = Peer(
    name="quack",
    distribution="quack-kernels",
    devices=("cuda",),
    lacks=lacks_nothing,
    call=call,
    note="in place",
    traffic=read_read_write,
)
