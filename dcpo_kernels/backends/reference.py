"""The oracle: every loss in plain PyTorch, read top to bottom like the equations, differentiated by
autograd.

Works in the dtype of the logits, float64 included (bf16 and fp16 are computed in float32).
Materializes several copies
of the logits: for tests, and for CPUs without the compiled module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.objectives import MIN_REST, Decision, Objective, decide


class RowStats(NamedTuple):
    """One softmax a row. All [N]."""

    logprobs: Tensor  # log-probability of the target
    entropy: Tensor
    lse: Tensor  # logsumexp of logits / temperature


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def shifted(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z = (x - max x) / temperature [N, V], and max x / temperature [N, 1]. Upcast first, and the
    maximum away before
    the temperature: a row shifted by 1e4 loses nothing."""
    x = logits.to(compute_dtype(logits))
    most = x.detach().amax(-1, keepdim=True)
    return (x - most) / temperature, most / temperature


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature). [N, V]"""
    return torch.log_softmax(shifted(logits, temperature)[0], dim=-1)


def row_stats(logits: Tensor, target_ids: Tensor, temperature: float = 1.0) -> RowStats:
    """logits [N, V], target_ids [N]."""
    z, most = shifted(logits, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    # H = -sum p log p; an entry with p = 0 has log p = -inf and contributes 0, to the gradient too
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    return RowStats(
        log_p.gather(-1, target_ids[:, None]).squeeze(-1),
        entropy,
        (most + torch.logsumexp(z, -1, keepdim=True)).squeeze(-1),
    )


def divergence(
    objective: Objective,
    logits: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor,
    temperature: float = 1.0,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    old_logits: Tensor | None = None,
) -> Tensor | None:
    """Divergence of the policy p from the behaviour policy q a row, [N]; None where `decide` needs
    none from outside.

    Top-K (DPPO section 4.2): over the K given ids, the sampled token (added where it is not among
    them) and one bucket for the rest. Full: over the whole row of old_logits / temperature. KL is
    KL(q || p).
    """
    if objective.needs_topk:
        assert topk_ids is not None and topk_logprobs is not None
        log_p = log_softmax(logits, temperature)
        ids, sampled = topk_ids.long(), target_ids[:, None]
        listed = (ids == sampled).any(-1, keepdim=True)
        new = torch.cat([log_p.gather(-1, ids), log_p.gather(-1, sampled)], -1)
        old = torch.cat([topk_logprobs, old_logprobs[:, None]], -1).to(new.dtype)
        counts = torch.cat([torch.ones_like(ids, dtype=torch.bool), ~listed], -1)
        p, q = torch.where(counts, new.exp(), 0.0), torch.where(counts, old.exp(), 0.0)
        rest_p = (1 - p.sum(-1)).clamp(min=MIN_REST)
        rest_q = (1 - q.sum(-1)).clamp(min=MIN_REST)
        if objective.divergence == "topk_tv":
            return 0.5 * ((p - q).abs().sum(-1) + (rest_p - rest_q).abs())
        inside = torch.where(q > 0, q * (old - new), 0.0).sum(-1)
        return inside + rest_q * (rest_q.log() - rest_p.log())
    if objective.needs_old_logits:
        assert old_logits is not None
        log_p = log_softmax(logits, temperature)
        log_q = log_softmax(old_logits.to(log_p.dtype), temperature)
        p, q = log_p.exp(), log_q.exp()
        if objective.divergence == "tv":
            return 0.5 * (p - q).abs().sum(-1)
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    return None


class Rows(NamedTuple):
    """Per row, [N]; zero (ratio 1) where the row does not count. Only token_loss is
    differentiable."""

    token_loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_rows(
    objective: Objective,
    logits: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    counts: Tensor,
    temperature: float = 1.0,
    *,
    response: Tensor | None = None,
    num_responses: int = 0,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    old_logits: Tensor | None = None,
) -> Rows:
    """The loss of every row. logits [N, V]; everything else [N] ([N, K] for the top K).

    counts: bool, the rows that count; any value may stand in the others, NaN included.
    response: the response each row belongs to, 0..num_responses-1; needed for
        ratio_level="sequence".
    """

    def cleared(x: Tensor | None, value: float = 0.0) -> Tensor | None:
        return None if x is None else torch.where(counts.view(-1, *[1] * (x.dim() - 1)), x, value)

    dtype = compute_dtype(logits)
    # Upcast here and nowhere else: then the gradient is rounded to the dtype of the logits once.
    logits = torch.where(counts[:, None], logits, 0.0).to(dtype)
    target_ids = torch.where(counts, target_ids, 0)
    old_logprobs = torch.where(counts, old_logprobs, 0.0).to(dtype)
    advantages = torch.where(counts, advantages, 0.0).to(dtype)
    old_logits, topk_ids, topk_logprobs = (
        cleared(old_logits),
        cleared(topk_ids, 0),
        cleared(topk_logprobs),
    )

    stats = row_stats(logits, target_ids, temperature)
    log_ratio = None
    if objective.ratio_level == "sequence":
        assert response is not None
        # GSPO eq. 7: s = exp(1/n sum_t (logp_t - old_t))
        moved = torch.where(counts, stats.logprobs - old_logprobs, 0.0)
        total = torch.zeros(num_responses, dtype=dtype, device=logits.device).index_add(
            0, response, moved
        )
        n = torch.zeros_like(total).index_add(0, response, counts.to(dtype))
        log_ratio = (total / n)[response]
    decision: Decision = decide(
        objective,
        stats.logprobs,
        old_logprobs,
        advantages,
        entropy=stats.entropy,
        ref_logprobs=cleared(ref_logprobs),
        importance_weights=cleared(importance_weights),
        log_ratio=log_ratio,
        divergence=divergence(
            objective,
            logits,
            target_ids,
            old_logprobs,
            temperature,
            topk_ids,
            topk_logprobs,
            old_logits,
        ),
    )
    return Rows(
        torch.where(counts, decision.loss, 0.0),
        torch.where(counts, stats.logprobs, 0.0).detach(),
        torch.where(counts, stats.entropy, 0.0).detach(),
        torch.where(counts, decision.ratio, 1.0),
        torch.where(counts, decision.clipped, 0).to(torch.int8),
    )
