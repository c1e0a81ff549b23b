"""Autograd around the operators: from what the door has checked to a `PolicyLoss` or to
log-probabilities, in one pass over the logits or in two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import arguments, ops, vocab_parallel
from dcpo_kernels.beyond_target import Full, decided_full, decided_listed, full_gradient
from dcpo_kernels.function import decide_by
from dcpo_kernels.metrics import Summary
from dcpo_kernels.ops.records import (
    Options,
    RatioGroups,
    Read,
    Responses,
    Results,
    RowCoefficients,
    RowStats,
    Targets,
    Tokens,
    replaced,
)
from dcpo_kernels.ops.row_gradient import write_part
from dcpo_kernels.vocab_parallel import Shard


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns. Per token: of the shape of target_ids, 0 (ratio 1) for tokens
    that don't count."""

    loss: Tensor  # scalar float32, the only differentiable one
    token_loss: Tensor  # before weighting, KL and entropy terms included
    logprobs: Tensor  # of the targets, under logits / temperature
    entropy: Tensor | None  # nats; None unless with_entropy or entropy_coef
    ratio: Tensor  # exp(logprobs - old_logprobs), per response for a ratio_level other than "token"
    clipped: Tensor  # int8: 0 none, 1 high, 2 low, 3 cap, 4 region
    response_loss: Tensor  # [R]: mean of token_loss over the response's tokens, 0 where it has none
    mask: Tensor  # bool: the token counts
    summary: Tensor  # what `summarize` reads


def first_derivatives_only(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has first derivatives in reverse mode: its gradient can't be differentiated "
            "again (create_graph=True, hessian)"
        )


def backward_once(ctx, name: str) -> None:
    """Own words for a second backward through what the first one has overwritten."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"backward ran a second time through one {name}, whose gradient was made where it "
            f"lies: call {name} again, or add the losses up before one backward"
        )
    ctx.spent = True


def without_zeros(ctx) -> None:
    """Backward gets None, not a tensor of zeros, for an output that has no gradient."""
    if not torch.compiler.is_compiling():  # Dynamo does not know it, and fuses the zeros away
        ctx.set_materialize_grads(False)


# ---- from logits --------------------------------------------------------------------------------


def with_weights(batch: arguments.Batch, like: Tensor) -> tuple[arguments.Batch, Responses]:
    """Mask or lengths become token weights, and what came per response one value per token, as
    `like` has them."""
    *responses, spread = ops.token_weights(
        like, *batch.grouping, list(batch.by_response.values()), batch.backend
    )
    responses = Responses(*responses)
    per_token = dict(zip(batch.by_response, spread, strict=True))
    temperatures = per_token.pop("temperatures", batch.rows.temperatures)
    if batch.entropy_weights is not None:
        per_token["entropy_weights"] = torch.where(
            responses.weights == 0, 0.0, batch.entropy_weights / responses.weights
        )
    batch = replaced(
        batch,
        rows=replaced(batch.rows, temperatures=temperatures),
        tokens=replaced(batch.tokens, weights=responses.weights, **per_token),
    )
    return batch, responses


def output(results: Results, responses: Responses, batch: arguments.Batch) -> PolicyLoss:
    loss, response_loss, summary = ops.finish(*results, *responses, batch.backend)
    if batch.dropped is not None:
        summary[Summary._fields.index("tokens_dropped")] = batch.dropped
    return PolicyLoss(loss, *results, response_loss, responses.mask, summary)


def scaled(batch: arguments.Batch) -> Tokens:
    """Its tokens with weights times loss_scale, which the gradient is then stored times."""
    if batch.loss_scale is None:
        return batch.tokens
    return replaced(batch.tokens, weights=batch.tokens.weights * batch.loss_scale)


def _one_pass(
    logits: Tensor, batch: arguments.Batch, with_gradient: bool
) -> tuple[PolicyLoss, Tensor | None]:
    """The loss, and its gradient in the logits times loss_scale: read, decide and write at once."""
    batch, responses = with_weights(batch, batch.rows.target_ids)
    tokens, numbers, options = scaled(batch), batch.objective.numbers, batch.options
    if with_gradient and batch.inplace:
        *results, _ = ops.fused_(logits, *batch.rows, *tokens, *numbers, *options, batch.backend)
        gradient = logits
    else:
        *results, _, gradient = ops.fused(
            logits, *batch.rows, *tokens, *numbers, *options, with_gradient, batch.backend
        )
    return output(Results(*results), responses, batch), gradient


class _OnePass(torch.autograd.Function):
    """The gradient is ready before backward begins."""

    @staticmethod
    def forward(ctx, logits, batch):
        out, gradient = _one_pass(logits, batch, with_gradient=True)
        if batch.inplace:
            torch.autograd.graph.increment_version(logits)  # a second reader fails loudly
        without_zeros(ctx)
        ctx.save_for_backward(gradient)
        ctx.loss_scale, ctx.backend = batch.loss_scale, batch.backend
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None
        first_derivatives_only("policy_loss")
        backward_once(ctx, "policy_loss")
        gradient = ctx.saved_tensors[0].detach()
        if ctx.loss_scale is not None:
            grad_loss = grad_loss / ctx.loss_scale
        ops.multiply_(gradient, grad_loss, ctx.backend)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(gradient)
        return gradient, None


def decided(
    read: Read, batch: arguments.Batch, responses: Responses
) -> tuple[Results, Tensor, Tensor]:
    """Results, and the derivatives of the loss in the log-probabilities and in the entropy."""
    spread = batch.ratio_by_response and batch.objective.ratio_level == "sequence"
    groups = RatioGroups(batch.ratio_by_response, spread, responses.offsets, responses.lengths)
    token_loss, ratio, clipped, g, h = ops.decide(
        *read, *batch.tokens, *batch.objective.numbers, *groups, batch.backend
    )
    entropy = read.logprobs.new_empty(0) if read.entropy is None else read.entropy
    return Results(token_loss, read.logprobs, entropy, ratio, clipped), g, h


def targets_of_pass(batch: arguments.Batch, responses: Responses) -> Targets:
    """What the first of two passes reads."""
    rows = responses.mask if batch.grouping.skip_zero is None else responses.weights != 0
    return Targets(batch.rows.target_ids, rows, batch.rows.temperatures)


def decided_rows(
    stats: RowStats, batch: arguments.Batch, responses: Responses
) -> tuple[Results, RowCoefficients]:
    """Between two passes: the results, and what the second writes the gradient from."""
    entropy = stats.entropy if batch.options.with_entropy else None
    results, g, h = decided(Read(stats.logprobs, entropy), batch, responses)
    has_entropy_term = batch.objective.entropy_coef != 0
    return results, RowCoefficients(
        target_ids=batch.rows.target_ids,
        temperatures=batch.rows.temperatures,
        row_max=stats.row_max,
        log_sum=stats.log_sum,
        entropy=stats.entropy if has_entropy_term else None,
        g=g,
        h=h if has_entropy_term else None,
    )


def _two_passes(logits: Tensor, batch: arguments.Batch) -> tuple[PolicyLoss, Any]:
    """The loss, and what backward writes the gradient from: a response's ratio is known once all of
    its rows are read, and that of a row split over ranks once all have read their part."""
    batch, responses = with_weights(batch, batch.rows.target_ids)
    rows, tokens, options, shard = batch.rows, batch.tokens, batch.options, batch.shard
    numbers, objective = batch.objective.numbers, batch.objective
    listed = shard is not None and objective.needs_topk
    targets = targets_of_function(batch, responses) if listed else targets_of_pass(batch, responses)
    stats = read_rows(logits, targets, options, batch.backend, shard)
    if shard is not None and objective.needs_old_logits:
        assert rows.old_logits is not None
        old_stats = read_rows(rows.old_logits, targets, options, batch.backend, shard)
        results, coefficients = decided_full(
            logits, stats, old_stats, numbers, rows, tokens, options, shard
        )
    elif listed:
        results, coefficients = decided_listed(stats, numbers, rows, tokens)
    else:
        results, coefficients = decided_rows(stats, batch, responses)
    return output(results, responses, batch), coefficients


def read_rows(
    logits: Tensor, targets: Targets, options: Options, backend: str, shard: Shard | None
) -> RowStats:
    if shard is None:
        return RowStats(*ops.row_stats(logits, *targets, *options, backend))
    part, rows = logits[..., : shard.width], logits.shape[:-1]

    def read(own: Targets) -> RowStats:
        return RowStats(*ops.row_stats(part, *own, *options, backend))

    return vocab_parallel.whole_stats(read, targets, rows, options, shard)


def _write(ctx, coefficients: RowCoefficients, logits: Tensor, factor: Tensor | None) -> Tensor:
    """What a backward of two passes returns."""
    shard = ctx.shard
    if not ctx.inplace and shard is None:
        return ops.row_gradient(logits, *coefficients, factor, *ctx.scaling, ctx.backend)
    gradient = logits.detach() if ctx.inplace else logits.detach().clone()

    def write(rows: Tensor, coefficients: RowCoefficients) -> None:
        ops.row_gradient_(rows, *coefficients, factor, *ctx.scaling, ctx.backend)

    if shard is None:
        write(gradient, coefficients)
    else:
        gradient[..., shard.width :] = 0  # padding
        own = vocab_parallel.local_ids(coefficients.target_ids, shard)
        if shard.width:
            own = replaced(coefficients, target_ids=own)
            write_part(write, gradient[..., : shard.width], own)
    if ctx.inplace:
        torch.autograd.graph.increment_version(gradient)
    return gradient


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, batch):
        out, coefficients = _two_passes(logits, batch)
        without_zeros(ctx)
        if isinstance(coefficients, Full):
            ctx.numbers, ctx.options = batch.objective.numbers, batch.options
            ctx.save_for_backward(logits, batch.rows.old_logits, *coefficients)
        else:
            ctx.numbers = None
            ctx.save_for_backward(logits, *coefficients)
        ctx.scaling = batch.options.temperature, batch.options.softcap
        ctx.shard = batch.shard
        ctx.inplace, ctx.backend = batch.inplace, batch.backend
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None
        first_derivatives_only("policy_loss")
        if ctx.inplace:
            backward_once(ctx, "policy_loss")
        logits, *saved = ctx.saved_tensors
        if ctx.numbers is None:
            return _write(ctx, RowCoefficients(*saved), logits, grad_loss), None
        old_logits, *full = saved
        gradient = full_gradient(
            logits, old_logits, Full(*full), ctx.numbers, grad_loss, ctx.options, ctx.shard
        )
        return gradient, None


def _by_function(logits: Tensor, batch: arguments.Batch) -> PolicyLoss:
    """Around a function of the user's: the read under autograd, so that backward writes."""
    batch, responses = with_weights(batch, batch.rows.target_ids)
    targets = targets_of_function(batch, responses)
    read = logprobs_of(logits, targets, batch.options, batch.inplace, batch.backend, batch.shard)
    return loss_by_function(*read, batch, responses)


def targets_of_function(batch: arguments.Batch, responses: Responses) -> Targets:
    """Each target, and what else a function is to see of its row."""
    ids, topk_ids = batch.rows.target_ids, batch.rows.topk_ids
    if topk_ids is not None:
        ids = torch.cat([ids[..., None], topk_ids], -1)
    return Targets(ids, responses.mask, batch.rows.temperatures)


def loss_by_function(
    logprobs: Tensor, entropy: Tensor | None, batch: arguments.Batch, responses: Responses
) -> PolicyLoss:
    """From the log-probabilities of `targets_of_function`, which carry the gradient."""
    assert batch.objective.function is not None
    topk_logprobs = None
    if batch.rows.topk_ids is not None:
        logprobs, topk_logprobs = logprobs[..., 0], logprobs[..., 1:]
    loss, results = decide_by(
        batch.objective.function,
        logprobs,
        topk_logprobs,
        entropy,
        batch.rows,
        batch.tokens,
        responses,
    )
    with torch.no_grad():
        out = output(results, responses, batch)
    return replaced(out, loss=loss, entropy=None if entropy is None else out.entropy)


def loss_of_logits(logits: Tensor, batch: arguments.Batch) -> PolicyLoss:
    if batch.objective.function is not None:
        return _by_function(logits, batch)
    two_passes = batch.ratio_by_response or batch.shard is not None
    if torch.is_grad_enabled() and logits.requires_grad:
        out = PolicyLoss(*(_TwoPasses if two_passes else _OnePass).apply(logits, batch))
    else:
        with torch.no_grad():
            run = _two_passes(logits, batch) if two_passes else _one_pass(logits, batch, False)
            out = run[0]
    return out if batch.options.with_entropy else replaced(out, entropy=None)


# ---- from log-probabilities ---------------------------------------------------------------------


def _from_logprobs(
    logprobs: Tensor, entropy: Tensor | None, batch: arguments.Batch
) -> tuple[PolicyLoss, Tensor, Tensor]:
    batch, responses = with_weights(batch, logprobs)
    results, g, h = decided(Read(logprobs, entropy), batch, responses)
    return output(results, responses, batch), g, h


class _FromLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, batch):
        # copies: they are outputs too
        own = None if entropy is None else entropy.clone()
        out, g, h = _from_logprobs(logprobs.clone(), own, batch)
        without_zeros(ctx)
        ctx.save_for_backward(g, h)
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None
        first_derivatives_only("policy_loss_from_logprobs")
        g, h = ctx.saved_tensors
        return g * grad_loss, h * grad_loss if h.numel() else None, None


def loss_of_logprobs(
    logprobs: Tensor, entropy: Tensor | None, batch: arguments.Batch
) -> PolicyLoss:
    if batch.objective.function is not None:
        batch, responses = with_weights(batch, logprobs.detach())
        return loss_by_function(logprobs, entropy, batch, responses)
    if torch.is_grad_enabled() and (
        logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    ):
        out = PolicyLoss(*_FromLogprobs.apply(logprobs, entropy, batch))
    else:
        with torch.no_grad():
            out = _from_logprobs(logprobs, entropy, batch)[0]
    return replaced(out, entropy=None) if entropy is None else out


# ---- log-probabilities --------------------------------------------------------------------------


def coefficients_of(
    stats: RowStats, targets: Targets, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> RowCoefficients:
    """What the gradients of log-probabilities and entropies are to their rows."""
    mask = targets.mask

    def of_rows_read(grad: Tensor | None) -> Tensor:
        if grad is None:
            return torch.zeros_like(stats.logprobs)
        if mask is None:
            return grad.contiguous()
        read = mask != 0 if grad.dim() == mask.dim() else (mask != 0).unsqueeze(-1)
        return torch.where(read, grad, 0.0).contiguous()

    with_entropy = grad_entropy is not None and stats.entropy.numel() > 0
    return RowCoefficients(
        targets.target_ids,
        targets.temperatures,
        stats.row_max,
        stats.log_sum,
        stats.entropy if with_entropy else None,
        of_rows_read(grad_logprobs),
        of_rows_read(grad_entropy) if with_entropy else None,
    )


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, options, inplace, backend, shard):
        stats = read_rows(logits, targets, options, backend, shard)
        without_zeros(ctx)
        ctx.save_for_backward(logits, *targets, *stats)
        ctx.scaling, ctx.shard = (options.temperature, options.softcap), shard
        ctx.inplace, ctx.backend = inplace, backend
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        first_derivatives_only("selected_logprobs")
        if ctx.inplace:
            backward_once(ctx, "selected_logprobs")
        logits, target_ids, mask, temperatures, *stats = ctx.saved_tensors
        targets = Targets(target_ids, mask, temperatures)
        coefficients = coefficients_of(RowStats(*stats), targets, grad_logprobs, grad_entropy)
        return _write(ctx, coefficients, logits, None), None, None, None, None, None


def logprobs_of(
    logits: Tensor,
    targets: Targets,
    options: Options,
    inplace: bool,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() and logits.requires_grad:
        logprobs, entropy = _SelectedLogprobs.apply(
            logits, targets, options, inplace, backend, shard
        )
    else:
        with torch.no_grad():
            logprobs, entropy, _, _ = read_rows(logits, targets, options, backend, shard)
    return logprobs, entropy if options.with_entropy else None
