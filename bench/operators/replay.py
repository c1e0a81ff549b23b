"""replay: the policy loss under the truncated distribution of a rollout, 64 ids per token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench import plain as formulas
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, fused
from dcpo_kernels.bench.operators.listed import neighbours

KEPT = 64


def minimum_bytes(inputs: Inputs) -> int:
    """The kept logits of a row that counts are read, and every row of the gradient is written."""
    size, vocab = inputs.logits.element_size(), inputs.case.vocab
    kept = min(KEPT, vocab) * inputs.counting_rows()
    return size * (kept + vocab * inputs.target_ids.numel())


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    arguments = {**inputs.loss_arguments(), "kept_ids": neighbours(inputs, KEPT)}
    return lambda logits: dk.policy_loss(logits, **arguments, inplace=inplace, backend=backend).loss


def plain(inputs: Inputs) -> Function:
    ids, loss = neighbours(inputs, KEPT), formulas.policy_loss(**inputs.loss_arguments())

    def run(logits: Tensor) -> Tensor:
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
        return loss(logits.masked_fill(outside, -torch.inf))

    return run


OPERATOR = replace(
    fused.OPERATOR,
    name="replay",
    title=f"policy loss over the {KEPT} ids that a token was sampled from, forward and backward",
    minimum_bytes=minimum_bytes,
    ours=ours,
    plain=plain,
    only_ours=True,
)
