"""flash-attn's Triton cross-entropy as log-probs."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.bench.peers import of_logprobs


def logprobs(inputs: Inputs) -> tuple[Function, bool]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    ids, vocab = inputs.target_ids, inputs.case.vocab  # id -100: ignored

    def run(logits: Tensor) -> Tensor:
        rows = logits.view(-1, vocab)
        return -cross_entropy_loss(rows, ids.flatten(), inplace_backward=True)[0].view(ids.shape)

    return run, True


PEER = of_logprobs("flash-attn", ("cuda",), logprobs, note="in place")
