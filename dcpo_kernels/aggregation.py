"""Token weights: loss = sum_t weight_t * token_loss_t, known before any logit is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcpo_kernels.objectives import AGGREGATIONS

Count = int | float | Tensor | None


def _wide(count: Count) -> Count:
    """A product of narrower integers may wrap."""
    if isinstance(count, Tensor) and not count.is_floating_point():
        return count.to(torch.int64)
    return count


def response_weights(
    counts: Tensor,
    aggregation: str,
    num_responses: Count = None,
    num_tokens: Count = None,
    max_length: Count = None,
) -> Tensor:
    """Weight of each token of a response, from the responses' token counts.

    counts: [R] integers >= 0. Returns [R] float32, 0 for a response without tokens. Arguments as in
        `token_weights`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    n = counts.to(torch.float32)
    num_responses, max_length = _wide(num_responses), _wide(max_length)

    def responses():
        return (counts > 0).sum() if num_responses is None else num_responses

    if aggregation == "only-token-mean":
        weight = n.reciprocal()
    elif aggregation == "seq-mean-token-mean":
        weight = (responses() * n).reciprocal()
    elif aggregation == "token-mean":
        weight = torch.ones_like(n) / (counts.sum() if num_tokens is None else num_tokens)
    elif aggregation == "token-sum":
        weight = torch.ones_like(n)
    else:
        if max_length is None:
            raise ValueError(
                "aggregation='seq-mean-token-sum-norm' needs max_length, the same in every "
                "micro-batch"
            )
        weight = torch.ones_like(n) / (responses() * max_length)
    return torch.where(n > 0, weight, 0.0)


def token_weights(
    lengths_or_mask: Tensor | Sequence[int],
    aggregation: str,
    num_responses: Count = None,
    num_tokens: Count = None,
    max_length: Count = None,
) -> Tensor:
    """Weight of every token, for the aggregations of GRPO, DAPO, DCPO and Dr. GRPO.

    lengths_or_mask: [R] lengths of packed responses (some may be 0), or a [B, T] mask, nonzero
        where a token counts.
    aggregation: "only-token-mean" 1/n_i (OTM, DCPO eq. 8), "seq-mean-token-mean" 1/(R n_i),
        "token-mean" 1/sum n, "token-sum" 1, "seq-mean-token-sum-norm" 1/(R max_length), n_i the
        tokens of response i, R the responses with at least one token.
    num_responses, num_tokens: R and sum n of the whole batch, so that the result does not depend on
        how it is split into micro-batches; by default those of this call. max_length: needed by
        "seq-mean-token-sum-norm".

    Returns [sum lengths] or [B, T] float32, 0 where the mask is 0.
    """
    given = lengths_or_mask
    if not isinstance(given, Tensor):  # as_tensor would move one to torch's default device
        given = torch.as_tensor(given)
    if given.shape == (0,):  # torch takes [] for floats
        given = given.to(torch.int64)
    if given.dim() == 1:
        if given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"lengths must be integers [R], got {given.dtype}")
        given = given.to(torch.int64)  # torch can't compare or repeat by every integer type
        if (given < 0).any():
            at = int(given.argmin())
            raise ValueError(
                f"lengths[{at}] is {int(given[at])}, a response can't have fewer than 0"
            )
        weight = response_weights(given, aggregation, num_responses, num_tokens, max_length)
        return weight.repeat_interleave(given)
    if given.dim() == 2:
        mask = given != 0
        weight = response_weights(mask.sum(1), aggregation, num_responses, num_tokens, max_length)
        return torch.where(mask, weight[:, None], 0.0)
    raise ValueError(
        f"lengths_or_mask must be lengths [R] or a mask [B, T], got shape {list(given.shape)}"
    )
