"""read: log-probs of the targets under no_grad, as rollouts and references take them."""

from __future__ import annotations

from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench import plain
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, Operator


def minimum_bytes(inputs: Inputs) -> int:
    """A row that counts is read once."""
    return inputs.case.vocab * inputs.logits.element_size() * inputs.counting_rows()


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    def run(logits: Tensor) -> Tensor:
        return dk.selected_logprobs(
            logits, inputs.target_ids, mask=inputs.mask, inplace=inplace, backend=backend
        )[0]

    return run


OPERATOR = Operator(
    name="read",
    title="log-probs, forward only",
    takes_objective=False,
    backward=False,
    upstream=False,
    minimum_bytes=minimum_bytes,
    ours=ours,
    plain=lambda inputs: plain.logprobs(inputs.target_ids),
)
