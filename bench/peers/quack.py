"""quack's cross_entropy as log-probs: CuTe DSL, a row kept on chip by a cluster of blocks."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.bench.peers import of_logprobs


def logprobs(inputs: Inputs) -> tuple[Function, bool]:
    from quack.cross_entropy import cross_entropy

    ids, vocab = inputs.target_ids, inputs.case.vocab  # id -100: ignored

    def run(logits: Tensor) -> Tensor:
        options = {"reduction": "none", "inplace_backward": True}
        return -cross_entropy(logits.view(-1, vocab), ids.flatten(), **options).view(ids.shape)

    return run, True


PEER = of_logprobs("quack", ("cuda",), logprobs, distribution="quack-kernels", note="in place")
