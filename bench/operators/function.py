"""function: the policy loss by a Python function between the read and the write, which here is an
objective's formula in PyTorch."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, fused, two_pass
from dcpo_kernels.decide import decide


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    objective = inputs.objective

    def token_loss(t: dk.TokenValues) -> Tensor:
        log_ratio = None
        if objective.by_response:
            moved, response = (t.logprobs - t.old_logprobs).flatten(), t.response.flatten()
            sums = moved.new_zeros(len(t.lengths)).index_add(0, response, moved)
            log_ratio = (sums / t.lengths.clamp(min=1))[t.response]
        given = t.logprobs, t.old_logprobs, t.advantages
        return decide(objective.numbers, *given, log_ratio=log_ratio).loss

    by_function = dk.Objective("mine", function=token_loss, aggregation=objective.aggregation)
    arguments = {**inputs.loss_arguments(), "objective": by_function}
    return lambda logits: dk.policy_loss(logits, **arguments, inplace=inplace, backend=backend).loss


OPERATOR = replace(
    fused.OPERATOR,
    name="function",
    title="policy loss by a Python function, forward and backward",
    minimum_bytes=two_pass.minimum_bytes,
    ours=ours,
)
