"""two_pass: log-probs of the targets and, once a loss elsewhere has said what each is worth, their
gradient."""

from __future__ import annotations

from dcpo_kernels.bench import plain
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Operator, read


def minimum_bytes(inputs: Inputs) -> int:
    """A row that counts is read twice, and every row of the gradient is written: what is between
    the passes is somebody else's, and no chip keeps the logits so long."""
    row = inputs.case.vocab * inputs.logits.element_size()
    return row * (2 * inputs.counting_rows() + inputs.target_ids.numel())


OPERATOR = Operator(
    name="two_pass",
    title="log-probs, forward and backward",
    takes_objective=False,
    backward=True,
    upstream=True,
    minimum_bytes=minimum_bytes,
    ours=read.ours,
    plain=plain.logprobs,
)
