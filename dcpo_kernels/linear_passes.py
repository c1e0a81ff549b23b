"""Autograd around the linear operators: from hidden states and a checked batch to a `PolicyLoss`,
to log-probabilities, or to the kept logits of a sampling replay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import arguments, ops, passes
from dcpo_kernels.ops.head import most_rows
from dcpo_kernels.ops.records import (
    Head,
    HeadGradients,
    Options,
    Results,
    RowCoefficients,
    RowStats,
    Targets,
    Wanted,
)
from dcpo_kernels.passes import PolicyLoss, replaced


class Linear(NamedTuple):
    """The vocabulary projection, and what it is applied to."""

    hidden: Tensor  # [N, D] or [B, T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    float32_logits: bool
    memory_limit: int
    into: Tensor | None  # [V, D]: what the weight's gradient is added to

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
    targets = passes.targets_of_pass(batch, responses)
    writes = any(wanted) or linear.into is not None
    keep = writes and _fits(linear)
    *stats, kept = ops.linear_row_stats(
        linear.hidden, *linear.head, *targets, *batch.options, keep, batch.backend
    )
    results, coefficients = passes.decided_rows(RowStats(*stats), batch, responses)
    out = passes.output(results, responses, batch)
    if not writes:
        return out, HeadGradients(*[kept] * 3)
    scale = batch.loss_scale
    if scale is not None and not isinstance(scale, Tensor):
        scale = coefficients.g.new_tensor(scale)
    gradients = _written(
        linear,
        wanted,
        kept if keep else None,
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
    return HeadGradients(
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
            backend,
        )
    )


class _LinearLoss(torch.autograd.Function):
    """All gradients are ready before backward begins."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, batch):
        linear = Linear(hidden, weight, bias, *rest)
        ctx.wanted = _wanted(ctx, linear.into)
        run = _two_passes if batch.ratio_by_response else _one_pass
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
        run = _two_passes if batch.ratio_by_response else _one_pass
        with torch.no_grad():
            out, _ = run(Linear(*linear[:5], into=None), batch, _NOTHING)
    return out if batch.options.with_entropy else replaced(out, entropy=None)


# ---- log-probabilities --------------------------------------------------------------------------


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, targets, options, backend):
        linear = Linear(hidden, weight, bias, *rest)
        ctx.keep = _fits(linear)
        *stats, kept = ops.linear_row_stats(
            hidden, *linear.head, *targets, *options, ctx.keep, backend
        )
        stats = RowStats(*stats)
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
            kept if ctx.keep else None,
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
            logprobs, entropy, *_ = ops.linear_row_stats(
                linear.hidden, *linear.head, *targets, *options, False, backend
            )
    return logprobs, entropy if options.with_entropy else None


# ---- kept logits --------------------------------------------------------------------------------


class _LinearGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, ids, mask):
        linear = Linear(hidden, weight, bias, *rest)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.rest, ctx.wanted = rest, _wanted(ctx, linear.into)
        return ops.linear_gather(hidden, *linear.head, ids, mask)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, ids = ctx.saved_tensors
        linear = Linear(hidden, weight, bias, *ctx.rest)
        gradients = HeadGradients(
            *ops.linear_gather_gradient(
                hidden, gradient, linear.into, *linear.head, *ctx.wanted, ids
            )
        )
        return *_for_autograd(gradients, ctx.wanted), None, None, None


def gathered(linear: Linear, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[.., S]: the logits of these ids, with a gradient to hidden states, weight and bias. Where an
    id comes more than once its gradient must too."""
    if wants_gradient(linear):
        return _LinearGather.apply(*linear[:3], linear[3:], ids, mask)
    with torch.no_grad():
        return ops.linear_gather(linear.hidden, *linear.head, ids, mask)
