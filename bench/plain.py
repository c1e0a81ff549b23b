"""The formulas as one would write them in PyTorch: what eager and torch.compile are timed on, what
turns a peer's log-probs into a loss, and what the demo times beside its own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.backends import reference
from dcpo_kernels.bench.operators import Function
from dcpo_kernels.decide import GAMMA, decide, log_ratio_part


def logprobs(target_ids: Tensor) -> Function:
    """[N, V] or [R, T, V] logits to the log-probs of the targets, [N] or [R, T]."""
    ids = target_ids.clamp(min=0)[..., None]

    def run(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), -1).gather(-1, ids).squeeze(-1)

    return run


def policy_loss(
    target_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    objective: dk.Objective,
    temperature: float = 1.0,
    num_responses: int,
    num_tokens: int,
    max_length: int,
    logprobs_of: Function | None = None,
    **extra: Tensor,
) -> Function:
    """Logits to the loss of dk.policy_loss, whose arguments these are: advantages [R], extra what a
    divergence needs. logprobs_of: somebody else's log-probs, with log_softmax as the default."""
    logprobs_of = logprobs_of or logprobs(target_ids)
    counted = lengths if mask is None else mask
    totals = (num_responses, num_tokens, max_length)
    weights = dk.token_weights(counted, objective.aggregation, *totals).flatten()
    responses = len(advantages)
    rows = lengths if mask is None else mask.shape[1]
    index = torch.arange(responses, device=advantages.device).repeat_interleave(rows)
    A, old, ids = advantages[index], old_logprobs.flatten(), target_ids.clamp(min=0).flatten()
    counts, numbers = weights > 0, objective.numbers
    tokens = torch.bincount(index[counts], minlength=responses)
    given: dict[str, Any] = {name: x.flatten(0, -2) for name, x in extra.items()}

    def run(logits: Tensor) -> Tensor:
        z = logits if temperature == 1 else logits / temperature
        logp = logprobs_of(z).flatten()
        entropy = log_ratio = divergence = None
        if objective.by_response:
            parts = log_ratio_part(numbers, logp, old, A, torch.ones_like(A))
            parts = torch.where(counts, parts, 0.0)
            log_ratio = parts.new_zeros(responses).index_add(0, index, parts)
            log_ratio = (log_ratio if numbers.surrogate == GAMMA else log_ratio / tokens)[index]
        if given:
            divergence = reference.divergence(
                numbers.divergence, logits.flatten(0, -2), ids, old, temperature, **given
            )
        if objective.entropy_coef:
            log_p = torch.log_softmax(z.flatten(0, -2).float(), -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        token_loss = decide(
            numbers, logp, old, A, entropy=entropy, log_ratio=log_ratio, divergence=divergence
        ).loss
        return torch.dot(weights, torch.where(counts, token_loss, 0.0))

    return run
