"""fused: the policy loss and its gradient, forward and backward."""

from __future__ import annotations

from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench import plain
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, Operator


def minimum_bytes(inputs: Inputs) -> int:
    """A row that counts is read once, twice where the decision waits for its whole response, and
    every row of the gradient is written. A full divergence reads the old row too. What there is per
    token is some 50 bytes beside 300,000."""
    row = inputs.case.vocab * inputs.logits.element_size()
    reads = 2 if inputs.objective.by_response else 1
    reads += inputs.objective.needs_old_logits
    return row * (reads * inputs.counting_rows(skips(inputs)) + inputs.target_ids.numel())


def skips(inputs: Inputs) -> bool:
    """Rows with advantage 0 are skipped where a case is about them."""
    return inputs.case.zero_advantage > 0


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    arguments = inputs.loss_arguments()

    def run(logits: Tensor) -> Tensor:
        options = {"inplace": inplace, "skip_zero_advantage": skips(inputs)}
        return dk.policy_loss(logits, **arguments, **options, backend=backend).loss

    return run


OPERATOR = Operator(
    name="fused",
    title="policy loss, forward and backward",
    takes_objective=True,
    backward=True,
    upstream=False,
    minimum_bytes=minimum_bytes,
    ours=ours,
    plain=lambda inputs: plain.policy_loss(**inputs.loss_arguments()),
)
