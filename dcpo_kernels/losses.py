"""What a training loop calls: `policy_loss`, and `selected_logprobs` for engines that keep a loss
of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcpo_kernels import arguments as args
from dcpo_kernels import ops
from dcpo_kernels.backends import reference
from dcpo_kernels.objectives import Objective, dcpo, decide, kernel_arguments
from dcpo_kernels.ops.library import check_ids


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns. Per token: of the shape of target_ids, 0 (ratio 1) for tokens
    that don't count."""

    loss: Tensor  # scalar float32, the only differentiable one
    token_loss: Tensor  # before weighting, KL and entropy terms included
    logprobs: Tensor  # of the targets, under logits / temperature
    entropy: Tensor | None  # nats; None unless with_entropy or entropy_coef
    ratio: Tensor  # exp(logprobs - old_logprobs), per response for ratio_level="sequence"
    clipped: Tensor  # int8: 0 none, 1 high, 2 low, 3 cap, 4 region
    response_loss: Tensor  # [R]: mean of token_loss over the response's tokens, 0 where it has none
    mask: Tensor  # bool: the token counts


def _without_zeros(ctx) -> None:
    """Backward gets None, not a tensor of zeros, for an output that has no gradient."""
    if not torch.compiler.is_compiling():  # Dynamo does not know it, and fuses the zeros away
        ctx.set_materialize_grads(False)


class _Fused(torch.autograd.Function):
    """Read, decide and write at once: the gradient is ready before backward begins."""

    @staticmethod
    def forward(ctx, logits, inplace, backend, *rest):
        if inplace:
            out = ops.fused_(logits, *rest, backend)
            torch.autograd.graph.increment_version(
                logits
            )  # a second reader of the logits fails loudly
            gradient = logits
        else:
            *out, gradient = ops.fused(logits, *rest, True, backend)
        _without_zeros(ctx)
        ctx.backend = backend
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*out)
        token_loss, weights = out[0], rest[3]
        return torch.dot(weights, token_loss), *out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        gradient = ctx.saved_tensors[0].detach()
        # In place: a second backward finds that the saved gradient has changed, and says so.
        ops.scale_(gradient, grad_loss, ctx.backend)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(gradient)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, counts, temperature, with_entropy, inplace, backend):
        logprobs, entropy, row_max, log_sum = ops.row_stats(
            logits, target_ids, counts, temperature, with_entropy, backend
        )
        _without_zeros(ctx)
        ctx.save_for_backward(logits, target_ids, counts, row_max, log_sum, entropy)
        ctx.temperature, ctx.with_entropy, ctx.inplace, ctx.backend = (
            temperature,
            with_entropy,
            inplace,
            backend,
        )
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, target_ids, counts, row_max, log_sum, entropy = ctx.saved_tensors
        g = torch.zeros_like(row_max) if grad_logprobs is None else grad_logprobs.contiguous()
        h = None if grad_entropy is None or not ctx.with_entropy else grad_entropy.contiguous()
        if counts is not None:
            g = torch.where(counts, g, 0.0)
            h = None if h is None else torch.where(counts, h, 0.0)
        rest = (target_ids, row_max, log_sum, entropy, g, h, ctx.temperature, ctx.backend)
        if ctx.inplace:
            gradient = logits.detach()
            ops.row_gradient_(gradient, *rest)
            torch.autograd.graph.increment_version(gradient)
        else:
            gradient = ops.row_gradient(logits, *rest)
        return gradient, None, None, None, None, None, None


def _selected_rows(
    logits: Tensor,
    target_ids: Tensor,
    counts: Tensor | None,
    temperature: float,
    with_entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    if backend == "reference":
        flat = logits.reshape(-1, logits.shape[-1])
        check_ids(target_ids, counts, flat.shape[1], "target_ids")
        if counts is not None:
            flat = torch.where(counts[:, None], flat, 0.0)
            target_ids = torch.where(counts, target_ids, 0)
        logprobs, entropy, _ = reference.row_stats(flat, target_ids, temperature)
        if counts is not None:
            logprobs, entropy = (
                torch.where(counts, logprobs, 0.0),
                torch.where(counts, entropy, 0.0),
            )
    else:
        logprobs, entropy = _SelectedLogprobs.apply(
            logits, target_ids, counts, temperature, with_entropy, inplace, backend
        )
    return logprobs, entropy if with_entropy else None


def selected_logprobs(
    logits: Tensor,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of chosen tokens under softmax(logits / temperature), and the entropy, both
    differentiable.

    logits: [N, V] or [B, T, V], bf16, fp16 or fp32; rows may be strided. target_ids: [N] or [B, T],
        int64 or int32; logits[t] predicts target_ids[t].
    mask: like target_ids; where it is 0 the row is not read, its results are 0, and it may hold any
        id.
    temperature: > 0, applied in float32.
    with_entropy: also return the entropy in nats.
    inplace: backward overwrites the logits with their gradient; a second reader of the logits then
        fails.
    backend: "auto", or one of `dcpo info`.

    Returns (logprobs, entropy or None), float32, of the shape of target_ids.

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: a NaN, or with DCPO_KERNELS_CHECK=1 the error).
    """
    backend = args.check_logits(logits, temperature, backend)
    if inplace:
        args.check_in_place(logits)
    ids = args.rows_of("target_ids", target_ids, logits, args.IDS, torch.int64)
    counts = None if mask is None else args.rows_of("mask", mask, logits, args.MASKS, torch.bool)
    logprobs, entropy = _selected_rows(
        logits, ids, counts, temperature, with_entropy, inplace, backend
    )
    shape = target_ids.shape
    return logprobs.view(shape), None if entropy is None else entropy.view(shape)


def policy_loss(
    logits: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    objective: Objective | None = None,
    temperature: float = 1.0,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    old_logits: Tensor | None = None,
    num_responses: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    max_length: int | Tensor | None = None,
    skip_zero_advantage: bool = False,
    with_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """A policy-gradient loss over vocabulary logits: every logit is read once, its gradient written
    once.

    logits: [N, V] packed responses, one after the other, or [B, T, V] padded; bf16, fp16 or fp32;
        rows may be strided (logits[:, :-1] is fine). Everything is computed in float32.
    target_ids: [N] or [B, T], int64 or int32; logits[t] predicts target_ids[t].
    old_logprobs: [N] or [B, T], log-probabilities of the policy that the ratio is taken against, at
        this temperature.
    advantages: per token, [N] or [B, T], or per response, [R] or [B].
    mask: [B, T], nonzero where a token counts, with padded logits. lengths: [R], with packed ones;
        may hold zeros. What stands in tokens that don't count (any id, NaN) has no effect, and
        their logits are not read.
    objective: a preset such as `dcpo()` (the default), `grpo()`, `dapo()`, `ppo()`.
    temperature: > 0; the loss is that of softmax(logits / temperature).
    ref_logprobs: per token; needed when objective.kl_coef != 0.
    importance_weights: per token or response; multiply the policy term only, not KL and entropy.
        For the mismatch between the engine that sampled and the one that trains.
    topk_ids, topk_logprobs: [.., K], K <= 128, what the behaviour policy reported; for dppo's top-K
        divergences.
    old_logits: like logits; for dppo's full divergences.
    num_responses, num_tokens, max_length: of the whole batch (`token_weights`), so that splitting
        it into micro-batches changes nothing.
    skip_zero_advantage: don't read rows with advantage 0 where nothing else pulls at them; their
        results are 0.
    with_entropy: also return the entropy.
    inplace: the forward overwrites the logits with their gradient, so no second [N, V] tensor is
        ever allocated. Nothing else may read the logits; what was saved for another backward fails
        loudly.
    backend: "auto", or one of `dcpo info`.

    Returns a `PolicyLoss`; out.loss.backward() honours any upstream gradient. A NaN or +inf logit
    makes its own row's loss and gradient NaN, and no other row's gradient.

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: that row's loss is NaN, or with DCPO_KERNELS_CHECK=1
    the error).
    """
    objective = dcpo() if objective is None else objective
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective such as dcpo(), got {objective!r}")
    backend = args.check_logits(logits, temperature, backend)
    if inplace:
        args.check_in_place(logits)
    responses = args.responses_of(logits, mask, lengths, objective)
    ids = args.rows_of("target_ids", target_ids, logits, args.IDS, torch.int64)
    old = args.rows_of("old_logprobs", old_logprobs, logits, args.FLOATS, torch.float32)
    A = args.per_token("advantages", advantages, logits, responses)
    if ref_logprobs is None and objective.kl_coef != 0:
        raise ValueError(
            f"objective {objective.name} has kl_coef={objective.kl_coef} and needs ref_logprobs"
        )
    ref = None
    if ref_logprobs is not None and objective.kl_coef != 0:
        ref = args.rows_of("ref_logprobs", ref_logprobs, logits, args.FLOATS, torch.float32)
    importance = None
    if importance_weights is not None:
        importance = args.per_token("importance_weights", importance_weights, logits, responses)
    k_ids, k_logprobs = args.topk_of(objective, topk_ids, topk_logprobs, logits)
    old_logits = args.old_logits_of(objective, old_logits, logits, backend)
    weights = args.weights_of(responses, objective, num_responses, num_tokens, max_length)
    with_entropy = with_entropy or objective.entropy_coef != 0

    counts = responses.counts  # the rows that are read; the fused operator looks at A itself
    one_pass = backend != "reference" and objective.ratio_level == "token"
    if not one_pass and skip_zero_advantage and not objective.pulls_without_advantage:
        live = counts & (A != 0)
        if objective.ratio_level == "sequence":  # a response's ratio needs all of its tokens
            live = args.spread(args.response_sums(live.to(torch.float32), responses) > 0, responses)
        counts = counts & live

    if backend == "reference":
        flat = logits.reshape(-1, logits.shape[-1])
        check_ids(ids, counts, flat.shape[1], "target_ids")
        if k_ids is not None:
            check_ids(k_ids, counts, flat.shape[1], "topk_ids")
        rows = reference.policy_rows(
            objective,
            flat,
            ids,
            old,
            A,
            counts,
            temperature,
            response=args.spread(
                torch.arange(len(responses.lengths), device=ids.device), responses
            ),
            num_responses=len(responses.lengths),
            ref_logprobs=ref,
            importance_weights=importance,
            topk_ids=k_ids,
            topk_logprobs=k_logprobs,
            old_logits=None if old_logits is None else old_logits.reshape(flat.shape),
        )
        loss = torch.dot(weights.to(rows.token_loss.dtype), rows.token_loss)
        out = (rows.token_loss.detach(), *rows[1:])
    elif objective.ratio_level == "sequence":
        logprobs, entropy = _selected_rows(
            logits, ids, counts, temperature, with_entropy, inplace, backend
        )
        moved = torch.where(counts, logprobs.detach() - old, 0.0)
        log_ratio = args.spread(args.response_sums(moved, responses) / responses.lengths, responses)
        decision = decide(
            objective,
            logprobs,
            torch.where(counts, old, 0.0),
            torch.where(counts, A, 0.0),
            entropy=entropy,
            ref_logprobs=None if ref is None else torch.where(counts, ref, 0.0),
            importance_weights=importance,
            log_ratio=torch.where(counts, log_ratio, 0.0),
        )
        token_loss = torch.where(counts, decision.loss, 0.0)
        loss = torch.dot(weights, token_loss)
        out = (
            token_loss.detach(),
            logprobs.detach(),
            None if entropy is None else entropy.detach(),
            decision.ratio,
            decision.clipped,
        )
    else:
        rest = (
            *(ids, old, A, weights, ref, importance, k_ids, k_logprobs, old_logits),
            *kernel_arguments(objective),
            *(temperature, with_entropy, skip_zero_advantage),
        )
        if torch.is_grad_enabled() and logits.requires_grad:
            loss, *out = _Fused.apply(logits, inplace, backend, *rest)
        else:
            *out, _ = ops.fused(logits, *rest, False, backend)
            loss = torch.dot(weights, out[0])

    token_loss, logprobs, entropy, ratio, clipped = out
    shape = target_ids.shape
    means = args.response_sums(token_loss, responses) / responses.lengths.clamp(min=1)
    return PolicyLoss(
        loss,
        token_loss.view(shape),
        logprobs.view(shape),
        entropy.view(shape) if entropy is not None and with_entropy else None,
        ratio.view(shape),
        clipped.view(shape),
        means,
        responses.counts.view(shape),
    )
