"""What a training loop calls: `policy_loss`, `policy_loss_from_logprobs` for engines that hand over
nothing else, and `selected_logprobs` for those that keep a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import arguments, backends, ops, replay
from dcpo_kernels.function import TokenLoss, decide_by
from dcpo_kernels.metrics import Summary
from dcpo_kernels.objective import Objective
from dcpo_kernels.ops.records import (
    Options,
    RatioGroups,
    Read,
    Responses,
    Results,
    RowCoefficients,
    RowStats,
    Targets,
    replaced,
)


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


def _first_derivatives_only(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has first derivatives in reverse mode: its gradient can't be differentiated "
            "again (create_graph=True, hessian)"
        )


def _backward_once(ctx, name: str) -> None:
    """Own words for a second backward through what the first one has overwritten."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"backward ran a second time through one {name}, whose gradient was made where it "
            f"lies: call {name} again, or add the losses up before one backward"
        )
    ctx.spent = True


def _without_zeros(ctx) -> None:
    """Backward gets None, not a tensor of zeros, for an output that has no gradient."""
    if not torch.compiler.is_compiling():  # Dynamo does not know it, and fuses the zeros away
        ctx.set_materialize_grads(False)


# ---- policy_loss --------------------------------------------------------------------------------


def _with_weights(batch: arguments.Batch, like: Tensor) -> tuple[arguments.Batch, Responses]:
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


def _output(results: Results, responses: Responses, batch: arguments.Batch) -> PolicyLoss:
    loss, response_loss, summary = ops.finish(*results, *responses, batch.backend)
    if batch.dropped is not None:
        summary[Summary._fields.index("tokens_dropped")] = batch.dropped
    return PolicyLoss(loss, *results, response_loss, responses.mask, summary)


def _one_pass(
    logits: Tensor, batch: arguments.Batch, with_gradient: bool
) -> tuple[PolicyLoss, Tensor | None]:
    """The loss, and its gradient in the logits times loss_scale: read, decide and write at once."""
    batch, responses = _with_weights(batch, batch.rows.target_ids)
    tokens = batch.tokens
    if batch.loss_scale is not None:
        tokens = replaced(tokens, weights=tokens.weights * batch.loss_scale)
    numbers, options = batch.objective.numbers, batch.options
    if with_gradient and batch.inplace:
        results = ops.fused_(logits, *batch.rows, *tokens, *numbers, *options, batch.backend)
        gradient = logits
    else:
        *results, gradient = ops.fused(
            logits, *batch.rows, *tokens, *numbers, *options, with_gradient, batch.backend
        )
    return _output(Results(*results), responses, batch), gradient


class _OnePass(torch.autograd.Function):
    """The gradient is ready before backward begins."""

    @staticmethod
    def forward(ctx, logits, batch):
        out, gradient = _one_pass(logits, batch, with_gradient=True)
        if batch.inplace:
            torch.autograd.graph.increment_version(logits)  # a second reader fails loudly
        _without_zeros(ctx)
        ctx.save_for_backward(gradient)
        ctx.loss_scale, ctx.backend = batch.loss_scale, batch.backend
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None
        _first_derivatives_only("policy_loss")
        _backward_once(ctx, "policy_loss")
        gradient = ctx.saved_tensors[0].detach()
        if ctx.loss_scale is not None:
            grad_loss = grad_loss / ctx.loss_scale
        ops.multiply_(gradient, grad_loss, ctx.backend)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(gradient)
        return gradient, None


def _decided(
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


def _two_passes(logits: Tensor, batch: arguments.Batch) -> tuple[PolicyLoss, RowCoefficients]:
    """The loss, and what backward writes the gradient from: a response's ratio is known once all of
    its rows are read."""
    batch, responses = _with_weights(batch, batch.rows.target_ids)
    rows, numbers, options = batch.rows, batch.objective.numbers, batch.options
    read_rows = responses.mask if batch.grouping.skip_zero is None else responses.weights != 0
    targets = Targets(rows.target_ids, read_rows, rows.temperatures)
    stats = RowStats(*ops.row_stats(logits, *targets, *options, batch.backend))
    entropy = stats.entropy if options.with_entropy else None
    results, g, h = _decided(Read(stats.logprobs, entropy), batch, responses)
    has_entropy_term = numbers.entropy_coef != 0
    coefficients = RowCoefficients(
        target_ids=rows.target_ids,
        temperatures=rows.temperatures,
        row_max=stats.row_max,
        log_sum=stats.log_sum,
        entropy=stats.entropy if has_entropy_term else None,
        g=g,
        h=h if has_entropy_term else None,
    )
    return _output(results, responses, batch), coefficients


def _write(ctx, coefficients: RowCoefficients, logits: Tensor, factor: Tensor | None) -> Tensor:
    """What a backward of two passes returns."""
    if not ctx.inplace:
        return ops.row_gradient(logits, *coefficients, factor, ctx.temperature, ctx.backend)
    gradient = logits.detach()
    ops.row_gradient_(gradient, *coefficients, factor, ctx.temperature, ctx.backend)
    torch.autograd.graph.increment_version(gradient)
    return gradient


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, batch):
        out, coefficients = _two_passes(logits, batch)
        _without_zeros(ctx)
        ctx.save_for_backward(logits, *coefficients)
        ctx.temperature = batch.options.temperature
        ctx.inplace, ctx.backend = batch.inplace, batch.backend
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None
        _first_derivatives_only("policy_loss")
        if ctx.inplace:
            _backward_once(ctx, "policy_loss")
        logits, *coefficients = ctx.saved_tensors
        return _write(ctx, RowCoefficients(*coefficients), logits, grad_loss), None


def _by_function(logits: Tensor, batch: arguments.Batch) -> PolicyLoss:
    """Around a function of the user's: the read under autograd, so that backward writes."""
    batch, responses = _with_weights(batch, batch.rows.target_ids)
    rows, topk_logprobs = batch.rows, None
    ids = rows.target_ids
    if rows.topk_ids is not None:
        ids = torch.cat([ids[..., None], rows.topk_ids], -1)
    targets = Targets(ids, responses.mask, rows.temperatures)
    logprobs, entropy = _selected(logits, targets, batch.options, batch.inplace, batch.backend)
    if rows.topk_ids is not None:
        logprobs, topk_logprobs = logprobs[..., 0], logprobs[..., 1:]
    return _loss_of(logprobs, topk_logprobs, entropy, batch, responses)


def _loss_of(
    logprobs: Tensor,
    topk_logprobs: Tensor | None,
    entropy: Tensor | None,
    batch: arguments.Batch,
    responses: Responses,
) -> PolicyLoss:
    assert batch.objective.function is not None
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
        out = _output(results, responses, batch)
    return replaced(out, loss=loss, entropy=None if entropy is None else out.entropy)


def policy_loss(
    logits: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    objective: Objective | TokenLoss | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    old_logits: Tensor | None = None,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    weights: Tensor | None = None,
    response_lengths: Tensor | Sequence[int] | None = None,
    response_log_ratio: Tensor | None = None,
    num_responses: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    max_length: int | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    skip_zero_advantage: bool = False,
    drop_nonfinite: bool = False,
    with_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """A policy-gradient loss over vocabulary logits: every logit is read once, its gradient written
    once.

    logits: [N, V] or [1, N, V] packed responses, one after the other, or [B, T, V] padded; bf16,
        fp16 or fp32; rows may be strided (logits[:, :-1] is fine). Everything is computed in
        float32. "Per token" below is [N], [1, N] or [B, T], as the logits have it.
    target_ids: per token, int64 or int32; logits[t] predicts target_ids[t].
    old_logprobs: per token, log-probabilities of the policy that the ratio is taken against, at
        this temperature. None: the policy itself (on-policy). The ratio is then exactly 1, the
        gradient is that of the ratio, and DCPO's bounds take its own probability.
    advantages: per token, or per response, [R] or [B] (or [R, 1]).
    lengths: [R] rows of each response, with packed logits; may hold zeros.
    mask: per token, nonzero where a token counts. Padded logits need it; packed ones may have it,
        for the rows of prompts and tools. What stands in tokens that don't count (any id, NaN) has
        no effect, and their logits are not read.
    objective: a preset such as `dcpo()` (the default), `grpo()`, `dapo()`, `ppo()`; or a function
        from `TokenValues` to a loss per token, which autograd differentiates between our read and
        our write (6 bytes per 16-bit logit; `Objective(name, function=...)` gives it an
        aggregation other than token-mean).
    temperature: > 0; the loss is that of softmax(logits / temperature). A number, or a tensor with
        one per token or per response.
    ref_logprobs: per token; needed when objective.kl_coef != 0.
    importance_weights: per token or response; multiply the policy term only, not KL and entropy.
        For the mismatch between the engine that sampled and the one that trains.
    rollout_logprobs: per token, by the engine that sampled; needed where objective.rollout_mode is
        not "none". The correction is then part of the pass, on-policy too, where no old
        log-probabilities are there to make `rollout_weights` of.
    entropy_weights: per token; the entropy term is then -entropy_coef * sum entropy_weights *
        entropy, whatever the tokens' weights are, over tokens that are read.
    topk_ids, topk_logprobs: [.., K], K <= 128, what the behaviour policy reported, no id twice in
        a row; for dppo's top-K divergences, or a function (K <= 127).
    old_logits: of the logits' shape, in any of their dtypes; for dppo's full divergences.
    kept_ids: [.., S], padded with -1, the ids that each token was sampled from (top-k, top-p), or
        [M] with kept_offsets [N + 1] where row i has those from kept_offsets[i] to
        kept_offsets[i + 1]. Everything is then of softmax over these: S logits of a row are read,
        and its gradient is zero elsewhere. A target that is none of its row's makes the row NaN;
        with drop_nonfinite it does not count. Not with top-K and full divergences.
    weights: per token: loss = sum weights * token_loss, in the place of the objective's
        aggregation. A token of weight 0 is not read.
    response_lengths: [R] tokens of each whole response that count, where a call holds only a part
        of it (chunks of a sequence, context parallelism). All that is counted comes from them:
        1/n_i, and without totals the number of responses and tokens too. response_loss is then
        this part's share of the mean.
    response_log_ratio: [R], for objectives with one ratio per response: its logarithm, the mean of
        logp - old_logp over the whole response (gmpo: of what is left of them by its clip; vespo:
        their sum and that of the logarithms of the importance weights), known beforehand. Then it
        is one pass, and each token has its own part of the gradient, as with "sequence-token".
    num_responses, num_tokens, max_length: of the whole batch (`token_weights`), so that splitting
        it into micro-batches changes nothing. One that is smaller than what is in the call is an
        error; where that would mean waiting for a GPU, the loss is NaN.
    loss_scale: what a GradScaler multiplies the loss with, a number or a device tensor. The
        gradient is stored times it, and only its ratio to the upstream gradient is applied in
        backward: with fp16 logits small entries would be 0 without it. The result is the same.
    skip_zero_advantage: don't read rows with advantage 0 where nothing else has a gradient; their
        results are 0.
    drop_nonfinite: a token whose old or rollout log-probability is not finite does not count; how
        many there were is in `summarize`.
    with_entropy: also return the entropy.
    inplace: the forward overwrites the logits with their gradient (gspo: the backward does), so no
        second [N, V] tensor is ever allocated. Nothing else may read the logits: autograd raises
        for a backward that had saved them, and who reads their values sees gradients.
    backend: "auto", or one of `dcpo info`.

    Returns a `PolicyLoss`; out.loss.backward() honours any upstream gradient. It runs once: a
    second backward through one call raises, but for objectives with a ratio per response that are
    not in place. A NaN or +inf logit, or a log-ratio of -inf - -inf, makes its own row's loss and
    gradient NaN, and no other row's gradient.

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: that row's loss is NaN, or with DCPO_KERNELS_CHECK=1
    the error).
    """
    backend = arguments.check_logits("logits", logits, backend)
    arguments.check_transforms("policy_loss", logits)
    objective, found = arguments.objective_of(objective), None
    if kept_ids is not None:
        if objective.needs_topk or objective.needs_old_logits:
            raise ValueError(
                f"kept_ids go with divergences of the sampled token alone, and objective "
                f"{objective.name} has {objective.divergence!r}"
            )
        if inplace:
            arguments.check_in_place(logits)
        kept = replay.kept(logits, target_ids, kept_ids, kept_offsets, inplace)
        logits, target_ids, found = kept
        inplace = True  # they are a copy
    batch = arguments.token_batch(
        logits,
        objective,
        old_logprobs,
        advantages,
        mask=mask,
        lengths=lengths,
        weights=weights,
        response_lengths=response_lengths,
        response_log_ratio=response_log_ratio,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        rollout_logprobs=rollout_logprobs,
        entropy_weights=entropy_weights,
        num_responses=num_responses,
        num_tokens=num_tokens,
        max_length=max_length,
        skip_zero_advantage=skip_zero_advantage,
        drop_nonfinite=drop_nonfinite,
        found=found,
        backend=backend,
    )
    batch = arguments.with_rows(
        batch,
        logits,
        target_ids,
        temperature=temperature,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        old_logits=old_logits,
        loss_scale=loss_scale,
        with_entropy=with_entropy,
        inplace=inplace,
    )
    if batch.objective.function is not None:
        return _by_function(logits, batch)
    two_passes = batch.ratio_by_response
    if torch.is_grad_enabled() and logits.requires_grad:
        out = PolicyLoss(*(_TwoPasses if two_passes else _OnePass).apply(logits, batch))
    else:
        with torch.no_grad():
            passes = _two_passes(logits, batch) if two_passes else _one_pass(logits, batch, False)
            out = passes[0]
    return out if batch.options.with_entropy else replaced(out, entropy=None)


# ---- policy_loss_from_logprobs -------------------------------------------------------------------


def _from_logprobs(
    logprobs: Tensor, entropy: Tensor | None, batch: arguments.Batch
) -> tuple[PolicyLoss, Tensor, Tensor]:
    batch, responses = _with_weights(batch, logprobs)
    results, g, h = _decided(Read(logprobs, entropy), batch, responses)
    return _output(results, responses, batch), g, h


class _FromLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, batch):
        # copies: they are outputs too
        own = None if entropy is None else entropy.clone()
        out, g, h = _from_logprobs(logprobs.clone(), own, batch)
        _without_zeros(ctx)
        ctx.save_for_backward(g, h)
        loss, *others = out
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None
        _first_derivatives_only("policy_loss_from_logprobs")
        g, h = ctx.saved_tensors
        return g * grad_loss, h * grad_loss if h.numel() else None, None


def policy_loss_from_logprobs(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    objective: Objective | TokenLoss | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    weights: Tensor | None = None,
    response_lengths: Tensor | Sequence[int] | None = None,
    response_log_ratio: Tensor | None = None,
    num_responses: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    max_length: int | Tensor | None = None,
    drop_nonfinite: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """`policy_loss` from log-probabilities that carry a gradient, for trainers that hand over
    nothing else. Every objective but those that compare more of a row (top-K and full divergences).

    logprobs: [N] or [1, N] packed, [B, T] padded; any float dtype, computed in float32. entropy: of
        the same shape; needed, and differentiable, where objective.entropy_coef != 0.
    The others as in `policy_loss`.

    Returns the same `PolicyLoss`; backward may run more than once.
    """
    if not isinstance(logprobs, Tensor) or logprobs.dim() not in (1, 2):
        raise ValueError(
            f"logprobs must be a tensor, [N] packed or [B, T] padded, got "
            f"{list(logprobs.shape) if isinstance(logprobs, Tensor) else type(logprobs).__name__}"
        )
    objective = arguments.objective_of(objective)
    backend = backends.choose(backend, logprobs.device.type)
    arguments.check_transforms("policy_loss_from_logprobs", logprobs)
    like = logprobs.unsqueeze(-1)  # a row of one logit per token
    batch = arguments.token_batch(
        like,
        objective,
        old_logprobs,
        advantages,
        mask=mask,
        lengths=lengths,
        weights=weights,
        response_lengths=response_lengths,
        response_log_ratio=response_log_ratio,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        rollout_logprobs=rollout_logprobs,
        entropy_weights=entropy_weights,
        num_responses=num_responses,
        num_tokens=num_tokens,
        max_length=max_length,
        skip_zero_advantage=False,
        drop_nonfinite=drop_nonfinite,
        backend=backend,
    )
    if objective.needs_topk or objective.needs_old_logits:
        raise ValueError(
            f"divergence={objective.divergence!r} takes more of a row than its log-probability: "
            "it goes with policy_loss"
        )
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"objective {objective.name} has entropy_coef={objective.entropy_coef} and needs "
            "entropy"
        )
    logprobs = arguments.values_of("logprobs", logprobs, like, backend)
    if entropy is not None:
        entropy = arguments.values_of("entropy", entropy, like, backend)
    if batch.objective.function is not None:
        batch, responses = _with_weights(batch, logprobs.detach())
        return _loss_of(logprobs, None, entropy, batch, responses)
    if torch.is_grad_enabled() and (
        logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    ):
        out = PolicyLoss(*_FromLogprobs.apply(logprobs, entropy, batch))
    else:
        with torch.no_grad():
            out = _from_logprobs(logprobs, entropy, batch)[0]
    return replaced(out, entropy=None) if entropy is None else out


# ---- selected_logprobs --------------------------------------------------------------------------


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, options, inplace, backend):
        stats = RowStats(*ops.row_stats(logits, *targets, *options, backend))
        _without_zeros(ctx)
        ctx.save_for_backward(logits, *targets, *stats)
        ctx.temperature, ctx.inplace, ctx.backend = options.temperature, inplace, backend
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        _first_derivatives_only("selected_logprobs")
        if ctx.inplace:
            _backward_once(ctx, "selected_logprobs")
        logits, target_ids, mask, temperatures, *stats = ctx.saved_tensors
        logprobs, entropy, row_max, log_sum = stats

        def of_rows_read(grad: Tensor | None) -> Tensor:
            if grad is None:
                return torch.zeros_like(logprobs)
            if mask is None:
                return grad.contiguous()
            read = mask != 0 if grad.dim() == mask.dim() else (mask != 0).unsqueeze(-1)
            return torch.where(read, grad, 0.0).contiguous()

        with_entropy = grad_entropy is not None and entropy.numel() > 0
        coefficients = RowCoefficients(
            target_ids,
            temperatures,
            row_max,
            log_sum,
            entropy if with_entropy else None,
            of_rows_read(grad_logprobs),
            of_rows_read(grad_entropy) if with_entropy else None,
        )
        return _write(ctx, coefficients, logits, None), None, None, None, None


def _selected(
    logits: Tensor, targets: Targets, options: Options, inplace: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() and logits.requires_grad:
        logprobs, entropy = _SelectedLogprobs.apply(logits, targets, options, inplace, backend)
    else:
        with torch.no_grad():
            logprobs, entropy, _, _ = ops.row_stats(logits, *targets, *options, backend)
    return logprobs, entropy if options.with_entropy else None


def selected_logprobs(
    logits: Tensor,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    with_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of chosen tokens under softmax(logits / temperature), and the entropy, both
    differentiable.

    logits: [N, V] or [B, T, V], bf16, fp16 or fp32; rows may be strided. target_ids: [N] or [B, T],
        int64 or int32; logits[t] predicts target_ids[t]. Or [.., K], K tokens of each row from one
        read: up to 128 where logits ask for a gradient, 1,024 where they don't. A row may have an
        id more than once.
    mask: [N] or [B, T]; where it is 0 the row is not read, its results are 0, and it may hold any
        id.
    temperature: > 0, applied in float32; a number, or a tensor with one per token.
    kept_ids, kept_offsets: as in `policy_loss`; a target that is none of its row's has NaN.
    with_entropy: also return the entropy in nats.
    inplace: backward overwrites the logits with their gradient; a second reader of the logits then
        fails.
    backend: "auto", or one of `dcpo info`.

    Returns (logprobs, entropy or None), float32: of the shape of target_ids, and [N] or [B, T].

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: a NaN, or with DCPO_KERNELS_CHECK=1 the error).
    """
    if kept_ids is not None:
        backend = arguments.check_logits("logits", logits, backend)
        if inplace:
            arguments.check_in_place(logits)
        logits, target_ids, _ = replay.kept(logits, target_ids, kept_ids, kept_offsets, inplace)
        inplace = True  # they are a copy
    targets, options, backend = arguments.targets_of(
        logits, target_ids, mask, temperature, with_entropy, inplace, backend
    )
    return _selected(logits, targets, options, inplace, backend)
