"""The oracle: every operator in plain PyTorch, read top to bottom like the equations, with the
gradient of `fused` from autograd.

Works in the dtype of the logits, float64 included (bf16 and fp16 are computed in float32).
Materializes several copies of the logits: for tests, and where nothing else can serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.decide import (
    FULL_KL,
    FULL_TV,
    GAMMA,
    GEOMETRIC_CLIP,
    TOPK_KL,
    TOPK_TV,
    Decision,
    cut_weight,
    log_ratio_part,
    rollout_weight,
)
from dcpo_kernels.decide import decide as decide_tokens
from dcpo_kernels.objective import (
    AGGREGATIONS,
    CLIP_CAP,
    CLIP_HIGH,
    CLIP_LOW,
    CLIP_NONE,
    CLIP_REGION,
    MAX_LOG_RATIO,
    MIN_CENTRE_REST,
    MIN_REST,
    Numbers,
)
from dcpo_kernels.responses import response_weights

if TYPE_CHECKING:
    from dcpo_kernels.ops import records

Temperature = float | Tensor  # one for all rows, or [N]


def unavailable(device: str = "cpu") -> str:
    return ""


# ---- the formulas -------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """One softmax per row. All [N]."""

    logprobs: Tensor  # log-probability of the target; [N, K] of K of them
    entropy: Tensor
    row_max: Tensor  # of the logits
    log_sum: Tensor  # logsumexp of (logits - row_max) / temperature


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def capped(x: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """softcap tanh(x / softcap) (arXiv 2408.00118), and its derivative. -inf stays what it is, a
    probability of 0, where tanh would give it some; +inf becomes NaN."""
    if softcap == 0:
        return x, 1.0
    value = softcap * torch.tanh(x / softcap) + (x - x)
    # 1 - tanh^2 has no digits left where tanh is near 1
    return torch.where(x == -torch.inf, x, value), torch.cosh(x / softcap).square().reciprocal()


def shifted(logits: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """z = (x - max x) / temperature [N, V], and max x [N, 1]. Upcast first, and the maximum away
    before the temperature: a row shifted by 1e4 loses nothing."""
    x = logits.to(compute_dtype(logits))
    row_max = x.detach().amax(-1, keepdim=True)
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    return (x - row_max) / temperature, row_max


def log_softmax(logits: Tensor, temperature: Temperature) -> Tensor:
    """log softmax(logits / temperature). [N, V]"""
    return torch.log_softmax(shifted(logits, temperature)[0], dim=-1)


def softmax_stats(logits: Tensor, target_ids: Tensor, temperature: Temperature = 1.0) -> Softmax:
    """logits [N, V], target_ids [N] or [N, K]."""
    z, row_max = shifted(logits, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    # H = -sum p log p; an entry with p = 0 has log p = -inf and contributes 0, to the gradient too
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    return Softmax(
        log_p.gather(-1, target_ids.view(len(log_p), -1)).view_as(target_ids),
        entropy,
        row_max.squeeze(-1),
        torch.logsumexp(z, -1),
    )


def divergence(
    kind: int,
    logits: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor,
    temperature: Temperature = 1.0,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    old_logits: Tensor | None = None,
) -> Tensor | None:
    """Divergence of the policy p from the behaviour policy q per row, [N]; None where `decide`
    needs none from outside.

    Top-K (DPPO section 4.2): over the K given ids, the sampled token (added where it is not among
    them) and one bucket for the rest. Full: over the whole row of old_logits / temperature. KL is
    KL(q || p).
    """
    if kind not in (TOPK_TV, TOPK_KL, FULL_TV, FULL_KL):
        return None
    log_p, log_q = log_softmax(logits, temperature), None
    if old_logits is not None:
        log_q = log_softmax(old_logits.to(log_p.dtype), temperature)
    return divergence_of(kind, log_p, target_ids, old_logprobs, topk_ids, topk_logprobs, log_q)


def divergence_of(
    kind: int,
    log_p: Tensor,  # [N, V]; of a full divergence some columns, and it is their part
    target_ids: Tensor,
    old_logprobs: Tensor,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    log_q: Tensor | None = None,  # as log_p
) -> Tensor:
    """The same from log-probabilities."""
    if kind in (FULL_TV, FULL_KL):
        assert log_q is not None
        p, q = log_p.exp(), log_q.exp()
        if kind == FULL_TV:
            return 0.5 * (p - q).abs().sum(-1)
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    assert topk_ids is not None and topk_logprobs is not None
    ids, sampled = topk_ids.long(), target_ids[:, None]
    listed = (ids == sampled).any(-1, keepdim=True)
    new = torch.cat([log_p.gather(-1, ids), log_p.gather(-1, sampled)], -1)
    old = torch.cat([topk_logprobs, old_logprobs[:, None]], -1).to(new.dtype)
    counted = torch.cat([torch.ones_like(ids, dtype=torch.bool), ~listed], -1)
    p, q = torch.where(counted, new.exp(), 0.0), torch.where(counted, old.exp(), 0.0)
    rest_p = (1 - p.sum(-1)).clamp(min=MIN_REST)
    rest_q = (1 - q.sum(-1)).clamp(min=MIN_REST)
    if kind == TOPK_TV:
        return 0.5 * ((p - q).abs().sum(-1) + (rest_p - rest_q).abs())
    inside = torch.where(q > 0, q * (old - new), 0.0).sum(-1)
    return inside + rest_q * (rest_q.log() - rest_p.log())


def centre(o: Numbers, log_p: Tensor, advantages: Tensor, topk_logprobs: Tensor) -> Tensor:
    """What a weight f of the ratio leaves of the score's mean over the engine's distribution q
    (arXiv 2609.20807), [N]: sum over the top K of (q f(p/q) - alpha p) log p, and alpha of the
    bucket for the rest, whose scores add up to minus those of the top K. log_p, topk_logprobs:
    [N, K]."""
    log_q, A = topk_logprobs.to(log_p.dtype), advantages[:, None]
    p, q, log_ratio = log_p.detach().exp(), log_q.exp(), log_p.detach() - log_q
    none = (q == 0) | (log_ratio.abs() > MAX_LOG_RATIO)  # a sampled token would have no gradient
    rest_p, rest_q = ((1 - x.sum(-1, keepdim=True)).clamp(min=MIN_CENTRE_REST) for x in (p, q))
    alpha = rest_q / rest_p * cut_weight(o, A, rest_p / rest_q)
    slopes = torch.where(none, 0.0, q * cut_weight(o, A, log_ratio.exp())) - alpha * p
    return torch.where(slopes == 0, 0.0, slopes * log_p).sum(-1)


def decision_of(
    numbers: Numbers,
    logprobs: Tensor,
    entropy: Tensor | None,
    beyond: Tensor | None,  # the divergence or the centre, where `decide` needs one from outside
    tokens: records.Tokens,
) -> Decision:
    """`decide` of tokens, all of which are read. [N]"""
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    return decide_tokens(
        numbers,
        logprobs,
        old,
        tokens.advantages,
        entropy=_weighted(entropy, tokens.entropy_weights),
        ref_logprobs=tokens.ref_logprobs,
        importance_weights=_importance(numbers, tokens, old),
        log_ratio=tokens.log_ratio,
        divergence=beyond,
    )


# ---- the operators ------------------------------------------------------------------------------


def read_rows(x: Any, read: Tensor, nothing: float = 0.0) -> Any:
    """[N, ..]: x with `nothing` in the rows that are not read, whatever stands there."""
    if x is None:
        return None
    x = x.reshape(read.numel(), *x.shape[read.dim() :])
    return torch.where(read.view(-1, *[1] * (x.dim() - 1)), x, nothing)


def read_tokens(tokens: records.Tokens, read: Tensor, dtype: torch.dtype) -> records.Tokens:
    values: list[Any] = [None if x is None else read_rows(x, read).to(dtype) for x in tokens]
    return type(tokens)(*values)


@contextlib.contextmanager
def _autograd(enabled: bool) -> Iterator[None]:
    """Autograd inside of an operator, which may run below autograd's keys of the dispatcher."""
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.set_grad_enabled(enabled):
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


def fused(
    logits: Tensor,
    gradient: Tensor | None,  # like logits, or logits itself; None: read and decide only
    rows: records.Rows,
    tokens: records.Tokens,
    numbers: Numbers,
    options: records.Options,
    results: records.Results,
    written: records.Written,
) -> None:
    read, dtype = tokens.weights != 0, compute_dtype(logits)
    # Upcast here and nowhere else: then the gradient is rounded to the dtype of the logits once.
    x, slope = capped(read_rows(logits.detach(), read).to(dtype), options.softcap)
    old_logits = read_rows(rows.old_logits, read)
    if old_logits is not None:
        old_logits, _ = capped(old_logits.to(dtype), options.softcap)
    ids = read_rows(rows.target_ids, read, 0)
    topk = {"topk_ids": read_rows(rows.topk_ids, read, 0)}
    topk["topk_logprobs"] = read_rows(rows.topk_logprobs, read)
    tokens = read_tokens(tokens, read, dtype)
    temperature = _temperature(rows.temperatures, read, options.temperature, dtype)
    with _autograd(gradient is not None):
        x.requires_grad_(gradient is not None)
        stats = softmax_stats(x, ids, temperature)
        old = stats.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
        if numbers.score_centering:
            log_p = log_softmax(x, temperature).gather(-1, topk["topk_ids"].long())
            beyond = centre(numbers, log_p, tokens.advantages, topk["topk_logprobs"])
        else:
            beyond = divergence(
                numbers.divergence, x, ids, old, temperature, **topk, old_logits=old_logits
            )
        decision = decision_of(numbers, stats.logprobs, stats.entropy, beyond, tokens)
        loss = (tokens.weights * decision.loss).sum()
        dx = None if gradient is None else torch.autograd.grad(loss, x)[0]
    if gradient is not None and dx is not None:
        gradient.copy_((dx * slope).view(logits.shape))
    found = (decision.loss, stats.logprobs, stats.entropy, decision.ratio, decision.clipped)
    for result, values in zip(results, found, strict=True):
        if result.numel():
            result.copy_(_counted(values.detach(), read, 1 if values is decision.ratio else 0))
    h = numbers.entropy_coef * _weighted(torch.ones_like(decision.g), tokens.entropy_weights)
    pulls = [tokens.weights * x != 0 for x in (decision.g, h, decision.divergence_coef)]
    written.has_gradient.copy_(_counted(torch.stack(pulls).any(0), read))


def _importance(numbers: Numbers, tokens: records.Tokens, old: Tensor) -> Tensor | None:
    """What multiplies the policy term; old: the old log-probabilities, or the policy's own."""
    weights = tokens.importance_weights
    if tokens.rollout_logprobs is None:
        return weights
    of_rollout = rollout_weight(numbers, old - tokens.rollout_logprobs)
    return of_rollout if weights is None else weights * of_rollout


def _weighted(entropy: Any, entropy_weights: Tensor | None) -> Any:
    return entropy if entropy is None or entropy_weights is None else entropy_weights * entropy


def _counted(values: Tensor, read: Tensor, nothing: float = 0) -> Tensor:
    return torch.where(read, values.view(read.shape), nothing)


def _temperature(
    temperatures: Tensor | None, read: Tensor, temperature: float, dtype: torch.dtype
) -> Temperature:
    if temperatures is None:
        return temperature
    T = read_rows(temperatures, read, 1.0).to(dtype)
    return torch.where(T > 0, T, torch.nan)


def row_stats(
    logits: Tensor, targets: records.Targets, options: records.Options, stats: records.RowStats
) -> None:
    dtype = compute_dtype(logits)
    read = torch.ones_like(stats.row_max, dtype=torch.bool)
    if targets.mask is not None:
        read = targets.mask != 0
    temperature = _temperature(targets.temperatures, read, options.temperature, dtype)
    x, _ = capped(read_rows(logits, read).to(dtype), options.softcap)
    ids = read_rows(targets.target_ids, read, 0)
    for result, values in zip(stats, softmax_stats(x, ids, temperature), strict=True):
        if result.numel():
            result.copy_(read_rows(values, read.view(-1)).view_as(result))


def row_gradient(
    logits: Tensor,
    gradient: Tensor,
    coefficients: records.RowCoefficients,
    factor: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    c, dtype = coefficients, compute_dtype(logits)
    ids, g = (x.view(c.row_max.numel(), -1) for x in (c.target_ids, c.g))  # [N, K]
    read = (g != 0).any(-1).view_as(c.row_max)
    read = read if c.h is None else read | (c.h != 0)
    T = _temperature(c.temperatures, read, temperature, dtype)
    T = T[:, None] if isinstance(T, Tensor) else T
    x, slope = capped(read_rows(logits, read).to(dtype), softcap)
    row_max, log_sum = (read_rows(value, read)[:, None] for value in (c.row_max, c.log_sum))
    log_p = (x - row_max) / T - log_sum
    p = log_p.exp()
    rows = read.view(-1)
    ids, g = read_rows(ids, rows, 0), read_rows(g, rows)
    own = torch.zeros_like(p).scatter_add_(1, ids, g)  # of the targets that are this entry
    dx = own * (1 - p) - (g.sum(-1, keepdim=True) - own) * p
    if c.h is not None:
        h, entropy = read_rows(c.h, read)[:, None], read_rows(c.entropy, read)[:, None]
        dx = dx - torch.where(p == 0, 0.0, h * p * (log_p + entropy))
    if factor is not None:
        dx = dx * factor
    dx = dx * slope
    gradient.copy_(torch.where(read.view(-1, 1), dx / T, 0.0).view(logits.shape))


def multiply_(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor.to(compute_dtype(x)))


def token_weights(
    grouping: records.Grouping,
    values: list[Tensor],
    responses: records.Responses,
    spread: list[Tensor],
) -> None:
    shape, device = responses.mask.shape, responses.mask.device
    rows, count = responses.mask.numel(), responses.lengths.numel()
    if grouping.lengths is None:
        ends = (torch.arange(count, device=device) + 1) * (rows // max(count, 1))
    else:  # whatever they are, no row outside is addressed
        ends = grouping.lengths.cumsum(0).clamp(0, rows).cummax(0).values
    responses.offsets.copy_(torch.cat([ends.new_zeros(1), ends]))
    index = torch.searchsorted(ends, torch.arange(rows, device=device), right=True)
    mask = index < count
    if grouping.mask is not None:
        mask = mask & (grouping.mask.reshape(-1) != 0)
    responses.mask.copy_(mask.view(shape))
    if not count:
        responses.weights.zero_()
        for result in spread:
            result.zero_()
        return
    index = index.clamp(max=count - 1)
    counts = torch.zeros_like(ends).index_add_(0, index, mask.to(torch.int64))
    if grouping.response_lengths is not None:
        whole = grouping.response_lengths
        counts = torch.where(whole >= counts, whole, -1)  # the others can't be
    responses.lengths.copy_(counts)

    read = mask
    if grouping.skip_zero is not None:
        live = grouping.skip_zero.reshape(-1) != 0
        live = live[index] if grouping.skip_by_response else live
        if grouping.skip_whole_responses:
            live = (torch.zeros_like(ends).index_add_(0, index, (live & mask).long()) > 0)[index]
        read = mask & live
    totals = {
        name: getattr(grouping, name)
        if getattr(grouping, f"{name}_on_device") is None
        else getattr(grouping, f"{name}_on_device")
        for name in ("num_responses", "num_tokens", "max_length")
    }
    weight = response_weights(counts, AGGREGATIONS[grouping.aggregation], **totals)[index]
    if grouping.weights is not None:
        weight = grouping.weights.reshape(-1)
    responses.weights.copy_(torch.where(read, weight, 0.0).view(shape))
    for result, value in zip(spread, values, strict=True):
        result.copy_(value[index].view(shape))


def decide(
    read: records.Read,
    tokens: records.Tokens,
    numbers: Numbers,
    groups: records.RatioGroups,
    decisions: records.Decisions,
    coefficients: records.Coefficients,
) -> None:
    live = tokens.weights != 0
    dtype = read.logprobs.dtype
    logprobs, entropy = read_rows(read.logprobs, live), read_rows(read.entropy, live)
    tokens = read_tokens(tokens, live, dtype)
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.log_ratio
    count = groups.lengths.numel()
    rows = torch.arange(live.numel(), device=live.device)
    index = torch.searchsorted(groups.offsets[1:], rows, right=True).clamp(max=max(count - 1, 0))
    if groups.by_response:
        # GSPO eq. 7: s = exp(1/n sum_t (logp_t - old_t))
        importance = _importance(numbers, tokens, old)
        importance = torch.ones_like(logprobs) if importance is None else importance
        parts = log_ratio_part(numbers, logprobs, old, tokens.advantages, importance)
        parts = torch.where(live.view(-1), parts, 0.0)
        log_ratio = _response_means(parts, groups.offsets, groups.lengths)
        if numbers.surrogate == GAMMA:
            log_ratio = log_ratio * groups.lengths.clamp(min=1)
        log_ratio = log_ratio[index] if count else torch.zeros_like(logprobs)  # of no response
    decision = decide_tokens(
        numbers,
        logprobs,
        old,
        tokens.advantages,
        entropy=_weighted(entropy, tokens.entropy_weights),
        ref_logprobs=tokens.ref_logprobs,
        importance_weights=_importance(numbers, tokens, old),
        log_ratio=log_ratio,
    )
    for result, values in zip(
        decisions, (decision.loss, decision.ratio, decision.clipped), strict=True
    ):
        result.copy_(_counted(values, live, 1 if values is decision.ratio else 0))
    weights = tokens.weights.view(live.shape)
    g = _counted(decision.g, live) * weights
    if groups.spread:
        pull = _counted(decision.through_ratio, live) * weights
        share = _response_means(pull.reshape(-1), groups.offsets, groups.lengths)
        share = share[index] if count else torch.zeros_like(logprobs)
        shares = (decision.clipped == CLIP_NONE) | (numbers.surrogate != GEOMETRIC_CLIP)
        shares = shares.view(live.shape) & live
        g = g + torch.where(shares, share.view(live.shape) - pull, 0.0)
    coefficients.g.copy_(g)
    if coefficients.h.numel():
        h = -numbers.entropy_coef * weights
        if tokens.entropy_weights is not None:
            h = h * tokens.entropy_weights.view(live.shape)
        coefficients.h.copy_(h)


def _response_means(x: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
    """[R] sums of each response's rows, in a fixed order, over how many of them count."""
    rows = torch.cat([offsets.diff(), len(x) - offsets[-1:]])  # those of no response come last
    sums = torch.segment_reduce(x, "sum", lengths=rows, unsafe=True, initial=0.0)
    return sums[:-1] / lengths.clamp(min=1)


def finish(results: records.Results, responses: records.Responses, totals: records.Totals) -> None:
    token_loss, logprobs, entropy, ratio, clipped = (x.reshape(-1) for x in results)
    weights = responses.weights.reshape(-1)
    read = weights != 0
    nothing = torch.zeros_like(token_loss)
    totals.loss.copy_(torch.where(read, weights.to(token_loss.dtype) * token_loss, nothing).sum())
    totals.response_loss.copy_(_response_means(token_loss, responses.offsets, responses.lengths))
    any_read = read.any() if read.numel() else read.new_zeros(())
    lowest = highest = ratio.new_ones(())
    if ratio.numel():
        lowest = torch.where(any_read, torch.where(read, ratio, torch.inf).amin(), 1.0)
        highest = torch.where(any_read, torch.where(read, ratio, -torch.inf).amax(), 1.0)
    summary = [
        totals.loss,
        responses.mask.sum(),
        read.sum(),
        torch.where(read, logprobs, nothing).sum(),
        torch.where(read, entropy, nothing).sum() if entropy.numel() else nothing.sum(),
        torch.where(read, ratio, nothing).sum(),
        lowest,
        highest,
        torch.where(read, ratio - 1 - ratio.log(), nothing).sum(),
        *((read & (clipped == side)).sum() for side in SIDES),
        nothing.sum(),  # tokens dropped: who asked for it knows it
    ]
    totals.summary.copy_(torch.stack([value.to(totals.summary.dtype) for value in summary]))


SIDES = (CLIP_HIGH, CLIP_LOW, CLIP_CAP, CLIP_REGION)
