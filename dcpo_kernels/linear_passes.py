"""Autograd around the linear operators: from hidden states and a checked batch to a `PolicyLoss`,
to log-probabilities, or to the kept logits of a sampling replay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import arguments, ops, passes
from dcpo_kernels.beyond_target import decided_listed
from dcpo_kernels.ops.head import logits_dtype, most_rows
from dcpo_kernels.ops.records import (
    Head,
    HeadGradients,
    Options,
    Results,
    RowCoefficients,
    RowStats,
    Targets,
    Wanted,
    replaced,
)
from dcpo_kernels.passes import PolicyLoss
from dcpo_kernels.vocab_parallel import Shard, added, local_ids, whole_stats
from dcpo_kernels.vocab_parallel import gathered as gathered_over_ranks


class Linear(NamedTuple):
    """The vocabulary projection, and what it is applied to."""

    hidden: Tensor  # [N, D] or [B, T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    float32_logits: bool
    memory_limit: int
    into: Tensor | None  # [V, D]: what the weight's gradient is added to
    shard: Shard | None = None  # of the vocabulary, whose rows weight and bias are

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.float32_logits, self.memory_limit)


def wants_gradient(linear: Linear) -> bool:
    given = (linear.hidden, linear.weight, linear.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _fits(linear: Linear) -> bool:
    """The logits of all rows are one chunk."""
    hidden = linear.hidden
    return hidden.shape[:-1].numel() <= most_rows(hidden, linear.head)


_NOTHING = Wanted(False, False, False)


def _wanted(ctx, into: Tensor | None) -> Wanted:
    of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
    return Wanted(of_hidden, of_weight and into is None, of_bias)


def _for_autograd(gradients: HeadGradients, wanted: Wanted) -> list[Tensor | None]:
    return [x if asked else None for x, asked in zip(gradients, wanted, strict=True)]


# ---- the loss -----------------------------------------------------------------------------------


def _one_pass(
    linear: Linear, batch: arguments.Batch, wanted: Wanted
) -> tuple[PolicyLoss, HeadGradients]:
    batch, responses = passes.with_weights(batch, batch.rows.target_ids)
    tokens = passes.scaled(batch)
    *results, of_hidden, of_weight, of_bias = ops.linear_fused(
        linear.hidden,
        linear.into,
        *linear.head,
        *wanted,
        *batch.rows,
        *tokens,
        *batch.objective.numbers,
        *batch.options,
        batch.backend,
    )
    out = passes.output(Results(*results), responses, batch)
    return out, HeadGradients(of_hidden, of_weight, of_bias)


def _two_passes(
    linear: Linear, batch: arguments.Batch, wanted: Wanted
) -> tuple[PolicyLoss, HeadGradients]:
    batch, responses = passes.with_weights(batch, batch.rows.target_ids)
    listed = linear.shard is not None and batch.objective.needs_topk
    targets_of = passes.targets_of_function if listed else passes.targets_of_pass
    targets = targets_of(batch, responses)
    writes = any(wanted) or linear.into is not None
    stats, kept = _read(linear, targets, batch.options, writes and _fits(linear), batch.backend)
    if listed:
        numbers = batch.objective.numbers
        results, coefficients = decided_listed(stats, numbers, batch.rows, batch.tokens)
    else:
        results, coefficients = passes.decided_rows(stats, batch, responses)
    out = passes.output(results, responses, batch)
    if not writes:
        nothing = linear.hidden.new_empty(0)
        return out, HeadGradients(nothing, nothing, nothing)
    scale = batch.loss_scale
    if scale is not None and not isinstance(scale, Tensor):
        scale = coefficients.g.new_tensor(scale)
    gradients = _written(
        linear,
        wanted,
        kept,
        targets.mask,
        coefficients,
        scale,
        batch.options,
        batch.backend,
    )
    return out, gradients


def _written(
    linear: Linear,
    wanted: Wanted,
    kept: Tensor | None,
    mask: Tensor | None,
    coefficients: RowCoefficients,
    factor: Tensor | None,
    options: Options,
    backend: str,
) -> HeadGradients:
    """The second pass. kept: the logits that the first one kept of the rows in `mask`."""
    shard = linear.shard
    if shard is not None:
        if not shard.width:
            return _of_nothing(linear, wanted)
        own = local_ids(coefficients.target_ids, shard)
        coefficients = replaced(coefficients, target_ids=own)
    gradients = HeadGradients(
        *ops.linear_row_gradient(
            linear.hidden,
            kept,
            linear.into,
            *linear.head,
            *wanted,
            *coefficients,
            mask,
            factor,
            options.temperature,
            options.softcap,
            shard is not None,
            backend,
        )
    )
    return _over_ranks(gradients, linear)


def _of_nothing(linear: Linear, wanted: Wanted) -> HeadGradients:
    """From a rank that has no part of the vocabulary."""
    given = (linear.hidden, linear.weight, linear.bias)
    made = (
        torch.zeros_like(x) if asked and x is not None else linear.hidden.new_empty(0)
        for x, asked in zip(given, wanted, strict=True)
    )
    return _over_ranks(HeadGradients(*made), linear)


def _over_ranks(gradients: HeadGradients, linear: Linear) -> HeadGradients:
    """Each rank's part of the vocabulary pulls at the hidden states."""
    of_hidden = gradients.hidden_gradient
    if linear.shard is None or not of_hidden.numel():
        return gradients
    return replaced(gradients, hidden_gradient=added(of_hidden, linear.shard.group))


def _read(
    linear: Linear, targets: Targets, options: Options, keep: bool, backend: str
) -> tuple[RowStats, Tensor | None]:
    """The first of two passes, and the logits of its rows where they are kept."""
    kept: list[Tensor] = []

    def read(targets: Targets) -> RowStats:
        *stats, logits = ops.linear_row_stats(
            linear.hidden, *linear.head, *targets, *options, keep, backend
        )
        kept.extend([logits] if keep else [])
        return RowStats(*stats)

    shard, rows = linear.shard, linear.hidden.shape[:-1]
    stats = read(targets) if shard is None else whole_stats(read, targets, rows, options, shard)
    return stats, kept[0] if kept else None


def _waits(linear: Linear, batch: arguments.Batch) -> bool:
    """A row's decision waits for other rows, or for other ranks."""
    return batch.ratio_by_response or linear.shard is not None


class _LinearLoss(torch.autograd.Function):
    """All gradients are ready before backward begins."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, batch):
        linear = Linear(hidden, weight, bias, *rest)
        ctx.wanted = _wanted(ctx, linear.into)
        run = _two_passes if _waits(linear, batch) else _one_pass
        out, gradients = run(linear, batch, ctx.wanted)
        passes.without_zeros(ctx)
        ctx.save_for_backward(*gradients)
        ctx.loss_scale, ctx.backend = batch.loss_scale, batch.backend
        ctx.added = linear.into is not None
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None, None, None
        passes.first_derivatives_only("linear_policy_loss")
        passes.backward_once(ctx, "linear_policy_loss")
        if ctx.loss_scale is not None:
            grad_loss = grad_loss / ctx.loss_scale
        if ctx.added:
            grad_loss = _only_one(grad_loss)
        gradients = HeadGradients(*(x.detach() for x in ctx.saved_tensors))
        for x in gradients:
            if x.numel():
                ops.multiply_(x if x.dim() > 1 else x[None], grad_loss, ctx.backend)
        return *_for_autograd(gradients, ctx.wanted), None, None


def _only_one(grad_loss: Tensor) -> Tensor:
    """weight_grad has its share of the gradient already, so the others can't be another multiple of
    it."""
    if grad_loss.device.type == "cpu" and not torch.compiler.is_compiling() and grad_loss != 1:
        raise RuntimeError(
            f"with weight_grad the loss must be what backward is called on (times loss_scale), but "
            f"its upstream gradient is {float(grad_loss)} times that: scale it by weights, "
            "num_tokens or loss_scale"
        )
    return torch.where(grad_loss == 1, grad_loss, torch.nan)


def loss_of_linear(linear: Linear, batch: arguments.Batch) -> PolicyLoss:
    if batch.objective.function is not None:
        batch, responses = passes.with_weights(batch, batch.rows.target_ids)
        targets = passes.targets_of_function(batch, responses)
        read = logprobs_of_linear(linear, targets, batch.options, batch.backend)
        return passes.loss_by_function(*read, batch, responses)
    if wants_gradient(linear):
        out = PolicyLoss(*_LinearLoss.apply(*linear[:3], linear[3:], batch))
    else:
        run = _two_passes if _waits(linear, batch) else _one_pass
        with torch.no_grad():
            out, _ = run(Linear(*linear[:5], None, linear.shard), batch, _NOTHING)
    return out if batch.options.with_entropy else replaced(out, entropy=None)


# ---- log-probabilities --------------------------------------------------------------------------


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, targets, options, backend):
        linear = Linear(hidden, weight, bias, *rest)
        stats, kept = _read(linear, targets, options, _fits(linear), backend)
        passes.without_zeros(ctx)
        ctx.save_for_backward(hidden, weight, bias, kept, *targets, *stats)
        ctx.rest, ctx.wanted = rest, _wanted(ctx, linear.into)
        ctx.options, ctx.backend = options, backend
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        passes.first_derivatives_only("linear_selected_logprobs")
        passes.backward_once(ctx, "linear_selected_logprobs")
        hidden, weight, bias, kept, target_ids, mask, temperatures, *stats = ctx.saved_tensors
        targets = Targets(target_ids, mask, temperatures)
        gradients = _written(
            Linear(hidden, weight, bias, *ctx.rest),
            ctx.wanted,
            kept,
            mask,
            passes.coefficients_of(RowStats(*stats), targets, grad_logprobs, grad_entropy),
            None,
            ctx.options,
            ctx.backend,
        )
        return *_for_autograd(gradients, ctx.wanted), None, None, None, None


def logprobs_of_linear(
    linear: Linear, targets: Targets, options: Options, backend: str
) -> tuple[Tensor, Tensor | None]:
    if wants_gradient(linear):
        logprobs, entropy = _LinearLogprobs.apply(
            *linear[:3], linear[3:], targets, options, backend
        )
    else:
        with torch.no_grad():
            (logprobs, entropy, *_), _ = _read(linear, targets, options, False, backend)
    return logprobs, entropy if options.with_entropy else None


# ---- kept logits --------------------------------------------------------------------------------


class _LinearGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, ids, mask):
        linear = Linear(hidden, weight, bias, *rest)
        shard = linear.shard
        if shard is None:
            own, missing = ids, None
        else:  # what this rank lacks has the place of one that it has
            own = local_ids(ids, shard)
            missing = own < 0
            first = (~missing).to(torch.int64).argmax(-1, keepdim=True)
            own = torch.where(missing, own.gather(-1, first), own).clamp(min=0)
        ctx.save_for_backward(hidden, weight, bias, own, missing)
        ctx.rest, ctx.wanted = rest, _wanted(ctx, linear.into)
        if shard is not None and not shard.width:
            values = hidden.new_empty(own.shape, dtype=logits_dtype(hidden, linear.head))
        else:
            values = ops.linear_gather(hidden, *linear.head, own, mask)
        if shard is None or missing is None:
            return values
        values = values.masked_fill(missing, -torch.inf)
        return gathered_over_ranks(values, shard.group, "the kept logits").amax(0)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, ids, missing = ctx.saved_tensors
        linear = Linear(hidden, weight, bias, *ctx.rest)
        if missing is not None:
            first = (~missing).to(torch.int64).argmax(-1, keepdim=True)
            gradient = torch.where(missing, gradient.gather(-1, first), gradient)
            gradient = torch.where(missing.all(-1, keepdim=True), 0.0, gradient)
        if linear.shard is not None and not linear.shard.width:
            gradients = _of_nothing(linear, ctx.wanted)
            return *_for_autograd(gradients, ctx.wanted), None, None, None
        gradients = HeadGradients(
            *ops.linear_gather_gradient(
                hidden, gradient, linear.into, *linear.head, *ctx.wanted, ids
            )
        )
        gradients = _over_ranks(gradients, linear)
        return *_for_autograd(gradients, ctx.wanted), None, None, None


def gathered(linear: Linear, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[.., S]: the logits of these ids, with a gradient to hidden states, weight and bias. Where an
    id comes more than once its gradient must too."""
    if wants_gradient(linear):
        return _LinearGather.apply(*linear[:3], linear[3:], ids, mask)
    with torch.no_grad():
        nothing = Linear(*linear[:5], None, linear.shard)
        return _LinearGather.apply(*nothing[:3], nothing[3:], ids, mask)
