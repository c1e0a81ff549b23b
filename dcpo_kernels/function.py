"""Any other loss between our read and our write: a Python function of what is known of each token,
differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.ops.records import Responses, Results, Rows, Tokens


class TokenValues(NamedTuple):
    """What a loss function is given. Per token, [N] or [B, T]; tokens that don't count hold 0."""

    logprobs: Tensor  # float32, carries the gradient
    old_logprobs: Tensor  # the policy's own, without a gradient, where none were given
    advantages: Tensor
    entropy: Tensor | None  # carries a gradient too; None unless with_entropy
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    rollout_logprobs: Tensor | None
    topk_logprobs: Tensor | None  # [.., K] of topk_ids, carries a gradient too
    old_topk_logprobs: Tensor | None  # [.., K] as they came
    weights: Tensor  # the loss is sum weights * token loss
    mask: Tensor  # bool: the token counts
    response: Tensor  # int64: the place of its response
    lengths: Tensor  # [R] int64: tokens of each response that count


TokenLoss = Callable[[TokenValues], Tensor]


def decide_by(
    function: TokenLoss,
    logprobs: Tensor,
    topk_logprobs: Tensor | None,
    entropy: Tensor | None,
    rows: Rows,
    tokens: Tokens,
    responses: Responses,
) -> tuple[Tensor, Results]:
    """The loss with its graph, and the results of each token without."""
    mask = responses.mask

    def counted(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() == mask.dim() + 1:
            return None if x is None else torch.where(mask[..., None], x, 0.0)
        return torch.where(mask, x.view(mask.shape), 0.0)

    places = torch.arange(mask.numel(), device=mask.device)
    response = torch.searchsorted(responses.offsets[1:], places, right=True)
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    values = TokenValues(
        logprobs=torch.where(mask, logprobs, 0.0),
        old_logprobs=torch.where(mask, old, 0.0),
        advantages=torch.where(mask, tokens.advantages.view(mask.shape), 0.0),
        entropy=counted(entropy),
        ref_logprobs=counted(tokens.ref_logprobs),
        importance_weights=counted(tokens.importance_weights),
        rollout_logprobs=counted(tokens.rollout_logprobs),
        topk_logprobs=counted(topk_logprobs),
        old_topk_logprobs=counted(rows.topk_logprobs),
        weights=responses.weights,
        mask=mask,
        response=response.clamp(max=max(len(responses.lengths) - 1, 0)).view(mask.shape),
        lengths=responses.lengths,
    )
    token_loss = function(values)
    if not isinstance(token_loss, Tensor) or token_loss.shape != mask.shape:
        got = (
            list(token_loss.shape) if isinstance(token_loss, Tensor) else type(token_loss).__name__
        )
        raise ValueError(
            f"the loss function must return one loss per token, shape {list(mask.shape)}, got {got}"
        )
    token_loss = torch.where(responses.weights != 0, token_loss, 0.0)
    loss = (responses.weights * token_loss).sum()
    ratio = (values.logprobs - values.old_logprobs).detach().exp()
    nothing = ratio.new_empty(0)
    return loss, Results(
        token_loss=token_loss.detach().to(ratio.dtype),
        logprobs=values.logprobs.detach(),
        entropy=nothing if values.entropy is None else values.entropy.detach(),
        ratio=ratio,
        clipped=torch.zeros_like(ratio, dtype=torch.int8),
    )
