"""trl's selective_log_softmax_and_entropy: log-probs and entropy in one Triton kernel, or in
PyTorch where that can't run."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.bench.peers import of_logprobs


def logprobs(inputs: Inputs) -> tuple[Function, bool]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    ids = inputs.target_ids.clamp(min=0)
    options = {"entropy_requires_grad": False, "row_mask": inputs.mask}

    def run(logits: Tensor) -> Tensor:
        return selective_log_softmax_and_entropy(logits, ids, **options)[0]

    return run, False


PEER = of_logprobs("trl", ("cpu", "cuda"), logprobs, note="computes the entropy too")
