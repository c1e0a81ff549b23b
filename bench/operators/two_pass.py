"""two_pass: log-probs of the targets, and their gradient once a loss outside has given the upstream
gradient of each."""

from __future__ import annotations

from dataclasses import replace

from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import read


def minimum_bytes(inputs: Inputs) -> int:
    """A row that counts is read twice, and every row of the gradient is written: between the passes
    runs a loss outside, for which no cache keeps the logits."""
    row = inputs.case.vocab * inputs.logits.element_size()
    return row * (2 * inputs.counting_rows() + inputs.target_ids.numel())


OPERATOR = replace(
    read.OPERATOR,
    name="two_pass",
    title="log-probs, forward and backward",
    backward=True,
    upstream=True,
    minimum_bytes=minimum_bytes,
)
