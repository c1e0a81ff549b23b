"""from_logprobs: log-probs that carry a gradient, and the policy loss from them, for trainers that
hand over nothing else."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, fused, read, two_pass


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    arguments = inputs.loss_arguments()
    del arguments["target_ids"]
    logprobs_of = read.ours(inputs, backend, inplace)

    def run(logits: Tensor) -> Tensor:
        return dk.policy_loss_from_logprobs(logprobs_of(logits), **arguments, backend=backend).loss

    return run


OPERATOR = replace(
    fused.OPERATOR,
    name="from_logprobs",
    title="policy loss from log-probs, forward and backward",
    minimum_bytes=two_pass.minimum_bytes,
    ours=ours,
)
