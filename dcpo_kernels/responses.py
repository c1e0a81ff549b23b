"""Which tokens belong together, and what each weighs: loss = sum_t weight_t * token_loss_t, known
before any logit is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcpo_kernels.objective import AGGREGATIONS

if TYPE_CHECKING:
    from dcpo_kernels.ops.records import Grouping

Count = int | float | Tensor | None


def response_weights(
    counts: Tensor,
    aggregation: str,
    num_responses: Count = None,
    num_tokens: Count = None,
    max_length: Count = None,
) -> Tensor:
    """Weight of each token of a response, from the responses' token counts.

    counts: [R] integers >= 0. Returns [R] float32, 0 for a response without tokens; NaN where a
        total is given that can't be one of a batch with these responses, or a count is negative.
        Arguments as in `token_weights`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    n = counts.to(torch.float32)

    def total(given: Count, counted: Tensor) -> Tensor:
        if given is None:
            return counted.to(torch.float32)
        given = torch.as_tensor(given, dtype=torch.float32, device=n.device)
        return torch.where((given > 0) & (given >= counted.to(torch.float32)), given, torch.nan)

    if aggregation == "only-token-mean":
        weight = n.reciprocal()
    elif aggregation == "seq-mean-token-mean":
        weight = (total(num_responses, (counts > 0).sum()) * n).reciprocal()
    elif aggregation == "token-mean":
        weight = torch.ones_like(n) / total(num_tokens, counts.sum())
    elif aggregation == "token-sum":
        weight = torch.ones_like(n)
    elif aggregation == "seq-mean-token-sum":
        weight = torch.ones_like(n) / total(num_responses, (counts > 0).sum())
    else:
        if max_length is None:
            raise ValueError(
                "aggregation='seq-mean-token-sum-norm' needs max_length, the same in every "
                "micro-batch"
            )
        longest = counts.max() if counts.numel() else counts.sum()
        responses = total(num_responses, (counts > 0).sum())
        weight = torch.ones_like(n) / (responses * total(max_length, longest))
    return torch.where(n < 0, torch.nan, torch.where(n == 0, 0.0, weight))


def check_totals(totals: Grouping, lengths: Tensor) -> None:
    """ValueError for a total of the whole batch, or of a whole response, that is smaller than what
    is in this call. On a GPU looking would mean waiting for it: there the weights are NaN."""
    given = {
        name: (getattr(totals, name), getattr(totals, f"{name}_on_device"))
        for name in ("num_responses", "num_tokens", "max_length")
    }
    nothing = totals.response_lengths is None and all(x == (None, None) for x in given.values())
    if lengths.device.type != "cpu" or nothing:
        return
    counts = lengths.tolist()
    for i, count in enumerate(counts):
        if count < 0:
            assert totals.response_lengths is not None
            raise ValueError(
                f"response_lengths[{i}] is {int(totals.response_lengths[i])}, fewer tokens than "
                "this call alone has of the response"
            )
    counted = {
        "num_responses": sum(n > 0 for n in counts),
        "num_tokens": sum(counts),
        "max_length": max(counts, default=0),
    }
    for name, (number, on_device) in given.items():
        total = number if on_device is None else float(on_device)
        if total is not None and not (total > 0 and total >= counted[name]):
            raise ValueError(
                f"{name}={total} must be > 0 and that of the whole batch, but this call alone has "
                f"{counted[name]}"
            )


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
        "token-mean" 1/sum n, "token-sum" 1, "seq-mean-token-sum" 1/R, "seq-mean-token-sum-norm"
        1/(R max_length), n_i the tokens of response i, R the responses with at least one token.
    num_responses, num_tokens: R and sum n of the whole batch, so that the result does not depend on
        how it is split into micro-batches; by default those of this call. max_length: needed by
        "seq-mean-token-sum-norm". A total smaller than what is in this call gives NaN.

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
