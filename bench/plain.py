"""The formulas as one would write them in PyTorch: what eager and torch.compile are timed on, and
what turns a peer's log-probs into a loss, as training engines do."""

from __future__ import annotations

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.backends import reference
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.decide import decide


def logprobs(inputs: Inputs) -> Function:
    """[N, V] or [R, T, V] logits to the log-probs of the targets, [N] or [R, T]."""
    ids = inputs.target_ids.clamp(min=0)[..., None]

    def run(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), -1).gather(-1, ids).squeeze(-1)

    return run


def policy_loss(inputs: Inputs, logprobs_of: Function) -> Function:
    """The loss on top of somebody's log-probs; everything but these is [N]."""
    objective, responses = inputs.objective, len(inputs.advantages)
    numbers, kind = objective.numbers, objective.numbers.divergence
    counted = inputs.lengths if inputs.mask is None else inputs.mask
    weights = dk.token_weights(counted, objective.aggregation, **inputs.totals).flatten()
    A, old = inputs.token_advantages().flatten(), inputs.old_logprobs.flatten()
    ids, counts, index = inputs.target_ids.clamp(min=0).flatten(), weights > 0, inputs.responses()
    lengths = torch.bincount(index[counts], minlength=responses)
    extra = {name: x.flatten(0, -2) for name, x in inputs.extra.items()}

    def run(logits: Tensor) -> Tensor:
        logp = logprobs_of(logits).flatten()
        entropy = log_ratio = divergence = None
        if objective.ratio_level == "sequence":
            moved = torch.where(counts, logp - old, 0.0)
            log_ratio = (moved.new_zeros(responses).index_add(0, index, moved) / lengths)[index]
        if extra:
            rows = logits.flatten(0, -2)
            divergence = reference.divergence(kind, rows, ids, old, **extra)
        if objective.entropy_coef:
            log_p = torch.log_softmax(logits.flatten(0, -2).float(), -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        token_loss = decide(
            numbers, logp, old, A, entropy=entropy, log_ratio=log_ratio, divergence=divergence
        ).loss
        return torch.dot(weights, torch.where(counts, token_loss, 0.0))

    return run
