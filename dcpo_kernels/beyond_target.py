"""Objectives that look at more of a row than its target, where the row is split over ranks: top-K
and full divergences, and score centering. In PyTorch, as the reference has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.backends import reference
from dcpo_kernels.decide import FULL_TV
from dcpo_kernels.objective import Numbers
from dcpo_kernels.ops.records import (
    Options,
    Results,
    RowCoefficients,
    Rows,
    RowStats,
    Tokens,
    replaced,
)
from dcpo_kernels.vocab_parallel import Shard, gathered, local_ids

_CHUNK = 1 << 22  # logits that are computed with at once


class _Pulls(NamedTuple):
    """Derivatives of the loss times the weights. [N] but for g"""

    g: Tensor  # of log-probabilities, [N] or [N, K]
    h: Tensor  # of the entropy
    c: Tensor  # of a full divergence


def _decided(
    numbers: Numbers,
    stats: RowStats,
    beyond: Tensor | None,
    place: Tensor | None,
    rows: Rows,
    tokens: Tokens,
) -> tuple[Results, _Pulls]:
    """beyond: a full divergence; None: what stats.logprobs [N, 1 + K] of the target and the top K
    say. place: of the target among them."""
    read = tokens.weights != 0
    shape, dtype = read.shape, stats.row_max.dtype
    own = reference.read_tokens(tokens, read, dtype)
    with torch.enable_grad():
        log_p = reference.read_rows(stats.logprobs, read).detach().requires_grad_()
        entropy = None
        if stats.entropy.numel():
            entropy = reference.read_rows(stats.entropy, read).detach().requires_grad_()
        target = log_p if log_p.dim() == 1 else log_p[:, 0]
        if beyond is not None:
            beyond = beyond.detach().view(-1).requires_grad_()
            inside = beyond
        else:
            assert place is not None
            of_top = reference.read_rows(rows.topk_logprobs, read)
            if numbers.score_centering:
                inside = reference.centre(numbers, log_p[:, 1:], own.advantages, of_top)
            else:
                old = target.detach() if own.old_logprobs is None else own.old_logprobs
                top = torch.arange(1, log_p.shape[1], device=log_p.device).expand(len(log_p), -1)
                kind = numbers.divergence
                inside = reference.divergence_of(kind, log_p, place, old, top, of_top)
        decision = reference.decision_of(numbers, target, entropy, inside, own)
        loss = torch.where(read.view(-1), own.weights * decision.loss, 0.0).sum()
        asked = [log_p, entropy, beyond]
        given = [x for x in asked if x is not None]
        found = iter(torch.autograd.grad(loss, given, allow_unused=True))
    pulls = [next(found) if x is not None else None for x in asked]

    def counted(x: Tensor, nothing: float = 0.0) -> Tensor:
        return torch.where(read, x.detach().view(shape), nothing)

    results = Results(
        token_loss=counted(decision.loss),
        logprobs=counted(target),
        entropy=stats.entropy if entropy is None else counted(entropy),
        ratio=counted(decision.ratio, 1.0),
        clipped=torch.where(read, decision.clipped.view(shape), 0).to(torch.int8),
    )
    zeros = torch.zeros_like(target)
    return results, _Pulls(*(zeros if x is None else x for x in pulls))


def decided_listed(
    stats: RowStats, numbers: Numbers, rows: Rows, tokens: Tokens
) -> tuple[Results, RowCoefficients]:
    """stats: of the target and the top K, in this order. [N, 1 + K]"""
    assert rows.topk_ids is not None
    match = (rows.topk_ids == rows.target_ids[..., None]).flatten(0, -2)
    place = torch.where(match.any(-1), match.to(torch.int64).argmax(-1) + 1, 0)
    results, pulls = _decided(numbers, stats, None, place, rows, tokens)
    has_entropy_term = numbers.entropy_coef != 0
    shape = stats.row_max.shape
    return results, RowCoefficients(
        target_ids=torch.cat([rows.target_ids[..., None], rows.topk_ids], -1),
        temperatures=rows.temperatures,
        row_max=stats.row_max,
        log_sum=stats.log_sum,
        entropy=stats.entropy if has_entropy_term else None,
        g=pulls.g.view(stats.logprobs.shape).contiguous(),
        h=pulls.h.view(shape).contiguous() if has_entropy_term else None,
    )


# ---- full divergences ---------------------------------------------------------------------------


class Full(NamedTuple):
    """What the gradient of a full divergence is written from. [N]"""

    target_ids: Tensor
    temperatures: Tensor | None
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor  # [0] without an entropy term
    old_row_max: Tensor
    old_log_sum: Tensor
    g: Tensor
    h: Tensor
    c: Tensor  # dloss/dD times the weight
    slopes: Tensor  # sum over the whole row of dD/dlog p


class _Columns(NamedTuple):
    """Of a chunk of rows, this rank's columns. [n, width]"""

    log_p: Tensor
    log_q: Tensor
    slope: Tensor | float  # of the soft cap


def _columns(
    logits: Tensor, old_logits: Tensor, full: Full, options: Options, width: int
) -> Iterator[tuple[slice, _Columns]]:
    """A few rows at a time."""
    x, y = (z.reshape(-1, z.shape[-1])[:, :width] for z in (logits, old_logits))
    row_max, log_sum, old_max, old_sum, T = (
        z.view(-1, 1)
        for z in (
            full.row_max,
            full.log_sum,
            full.old_row_max,
            full.old_log_sum,
            _temperatures(full, options),
        )
    )
    size = max(_CHUNK // max(width, 1), 1)
    for start in range(0, len(x), size):
        at = slice(start, start + size)
        new, slope = reference.capped(x[at].float(), options.softcap)
        old, _ = reference.capped(y[at].float(), options.softcap)
        log_p = (new - row_max[at]) / T[at] - log_sum[at]
        yield at, _Columns(log_p, (old - old_max[at]) / T[at] - old_sum[at], slope)


def _temperatures(full: Full, options: Options) -> Tensor:
    if full.temperatures is None:
        return torch.full_like(full.row_max, options.temperature)
    return full.temperatures


def _slopes(kind: int, columns: _Columns) -> Tensor:
    """dD/dlog p of each entry."""
    p, q = columns.log_p.exp(), columns.log_q.exp()
    return 0.5 * (p - q).sign() * p if kind == FULL_TV else -q


def decided_full(
    logits: Tensor,  # this rank's columns, as rows.old_logits
    stats: RowStats,
    old_stats: RowStats,
    numbers: Numbers,
    rows: Rows,
    tokens: Tokens,
    options: Options,
    shard: Shard,
) -> tuple[Results, Full]:
    assert rows.old_logits is not None
    none = torch.zeros_like(stats.row_max)
    full = Full(
        target_ids=rows.target_ids,
        temperatures=rows.temperatures,
        row_max=stats.row_max,
        log_sum=stats.log_sum,
        entropy=stats.entropy,
        old_row_max=old_stats.row_max,
        old_log_sum=old_stats.log_sum,
        g=none,
        h=none,
        c=none,
        slopes=none,
    )
    parts, ids = none.new_zeros(2, none.numel()), rows.target_ids
    for at, columns in _columns(logits, rows.old_logits, full, options, shard.width):
        kind, log_p, log_q = numbers.divergence, columns.log_p, columns.log_q
        parts[0, at] = reference.divergence_of(kind, log_p, ids, none, log_q=log_q)
        parts[1, at] = _slopes(kind, columns).sum(-1)
    divergence, slopes = gathered(parts, shard.group, "the divergence").sum(0)
    results, pulls = _decided(numbers, stats, divergence, None, rows, tokens)
    g, h, c, slopes = (x.view(none.shape) for x in (*pulls, slopes))
    return results, replaced(full, g=g, h=h, c=c, slopes=slopes)


def full_gradient(
    logits: Tensor,  # this rank's columns
    old_logits: Tensor,
    full: Full,
    numbers: Numbers,
    factor: Tensor,
    options: Options,
    shard: Shard,
) -> Tensor:
    """dx = factor/T [g (1[j = y] - p) - h p (log p + H) + c (dD/dlog p - p sum dD/dlog p)]"""
    T = _temperatures(full, options)
    entropy = full.entropy if full.entropy.numel() else torch.zeros_like(T)
    own = local_ids(full.target_ids, shard)
    active = (full.g != 0) | (full.h != 0) | (full.c != 0)
    g, h, c, slopes, entropy, own, active, scale = (
        x.view(-1, 1)
        for x in (full.g, full.h, full.c, full.slopes, entropy, own, active, factor / T)
    )
    gradient = logits.new_zeros(logits.shape)
    flat = gradient.view(-1, logits.shape[-1])[:, : shard.width]
    for at, columns in _columns(logits, old_logits, full, options, shard.width):
        log_p, p = columns.log_p, columns.log_p.exp()
        is_target = torch.arange(shard.width, device=p.device) == own[at]
        dx = g[at] * torch.where(is_target, -torch.expm1(log_p), -p)
        dx -= torch.where(p == 0, 0.0, h[at] * p * (log_p + entropy[at]))
        of_divergence = c[at] * (_slopes(numbers.divergence, columns) - p * slopes[at])
        dx += torch.where(c[at] == 0, 0.0, of_divergence)
        flat[at] = torch.where(active[at], dx * columns.slope * scale[at], 0.0).to(logits.dtype)
    return gradient
