"""listed: log-probs of 20 ids per row under no_grad, as a distillation or a top-K divergence wants
them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, read

K = 20


def neighbours(inputs: Inputs, count: int) -> Tensor:
    """[.., count] ids: the target's and those after it."""
    vocab = inputs.case.vocab
    after = torch.arange(min(count, vocab), device=inputs.target_ids.device)
    return (inputs.target_ids.clamp(min=0)[..., None] + after) % vocab


def ours(inputs: Inputs, backend: str, inplace: bool) -> Function:
    ids = neighbours(inputs, K)
    return lambda logits: dk.selected_logprobs(logits, ids, mask=inputs.mask, backend=backend)[
        0
    ].sum(-1)


def plain(inputs: Inputs) -> Function:
    ids = neighbours(inputs, K)
    return lambda logits: torch.log_softmax(logits.float(), -1).gather(-1, ids).sum(-1)


OPERATOR = replace(
    read.OPERATOR,
    name="listed",
    title=f"log-probs of {K} ids per row, forward only",
    ours=ours,
    plain=plain,
    only_ours=True,
)
