"""What a training loop calls: `policy_loss`, `policy_loss_from_logprobs` for engines that hand over
nothing else, and `selected_logprobs` for those that keep a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dcpo_kernels import arguments, backends, checks, passes, replay, vocab_parallel
from dcpo_kernels.function import TokenLoss
from dcpo_kernels.objective import Objective
from dcpo_kernels.passes import PolicyLoss
from dcpo_kernels.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    logit_softcap: float | None = None,
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
    vocab_group: ProcessGroup | VocabShard | None = None,
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
    logit_softcap: > 0; the logits are logit_softcap * tanh(logits / logit_softcap) before anything
        else, old_logits too (Gemma 2's final_logit_softcapping, arXiv 2408.00118), so hand over
        those that the model did not cap. A logit of -inf stays one, and its probability 0.
    ref_logprobs: per token; needed when objective.kl_coef != 0.
    importance_weights: per token or response; multiply the policy term only, not KL and entropy.
        For the mismatch between the engine that sampled and the one that trains.
    rollout_logprobs: per token, by the engine that sampled; needed where objective.rollout_mode is
        not "none". The correction is then part of the pass, on-policy too, where no old
        log-probabilities are there to make `rollout_weights` of.
    entropy_weights: per token; the entropy term is then -entropy_coef * sum entropy_weights *
        entropy, whatever the tokens' weights are, over tokens that are read.
    topk_ids, topk_logprobs: [.., K], K <= 128, what the behaviour policy reported, no id twice in
        a row; for dppo's top-K divergences, score centering or a function (K <= 127).
    old_logits: of the logits' shape, in any of their dtypes; for dppo's full divergences.
    kept_ids: [.., S], padded with -1, the ids that each token was sampled from (top-k, top-p), or
        [M] with kept_offsets [N + 1] where row i has those from kept_offsets[i] to
        kept_offsets[i + 1]. Everything is then of softmax over these: S logits of a row are read,
        and its gradient is zero elsewhere. A target that is none of its row's makes the row NaN;
        with drop_nonfinite it does not count. Not with top-K and full divergences.
    weights: per token: loss = sum weights * token_loss, in the place of the objective's
        aggregation. A token of weight 0 is not read.
    response_lengths: [R] tokens of each whole response that count, where a call holds only a part
        of it (chunks of a sequence; context parallelism: `whole_responses`). All that is counted
        comes from them: 1/n_i, and without totals the number of responses and tokens too.
        response_loss is then this part's share of the mean.
    response_log_ratio: [R], for objectives with one ratio per response: its logarithm, the mean of
        logp - old_logp over the whole response (gmpo: of what is left of them by its clip; vespo:
        their sum and that of the logarithms of the importance weights), known beforehand. Then it
        is one pass, and each token has its own part of the gradient, as with "sequence-token".
    num_responses, num_tokens, max_length: of the whole batch (`token_weights`), so that splitting
        it into micro-batches, or over ranks (`global_normalizers`), changes nothing. One that is
        smaller than what is in the call is an error; where that would mean waiting for a GPU, the
        loss is NaN.
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
    vocab_group: the process group over which the vocabulary is split: logits are this rank's
        columns, everything else is whole and the same on all ranks, and so is what is returned
        (`VocabShard` for columns that are not simply one rank's after the other's, or padded).
        Logits that are a DTensor with Shard(-1) say it themselves. old_logits are columns too. Read
        and written in two passes with one all-gather between them; all ranks must call.
    backend: "auto", or one of `dcpo info`.

    Returns a `PolicyLoss`; out.loss.backward() honours any upstream gradient. It runs once: a
    second backward through one call raises, but for objectives with a ratio per response that are
    not in place. A NaN or +inf logit, or a log-ratio of -inf - -inf, makes its own row's loss and
    gradient NaN, and no other row's gradient.

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: that row's loss is NaN, or with DCPO_KERNELS_CHECK=1
    the error).
    """
    objective, found = arguments.objective_of(objective), None
    said = {"objective": objective, "with_entropy": with_entropy}
    logits, shard = vocab_parallel.split(logits, vocab_group, said)
    backend = checks.check_logits("logits", logits, backend)
    checks.check_transforms("policy_loss", logits)
    if inplace:
        checks.check_in_place(logits)
    if kept_ids is not None:
        if objective.beyond_target:
            raise ValueError(
                f"kept_ids go with what looks at the sampled token alone, and objective "
                f"{objective.name} has {objective.beyond_target}"
            )
        whole = vocab_parallel.all_columns(logits, shard)
        kept = replay.kept(whole, target_ids, kept_ids, kept_offsets)
        logits, shard = replay.kept_logits(logits, kept, inplace, shard), None
        target_ids, found = kept.place, kept.found
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
        logit_softcap=logit_softcap,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        old_logits=old_logits,
        loss_scale=loss_scale,
        with_entropy=with_entropy,
        inplace=inplace,
        shard=shard,
    )
    return passes.loss_of_logits(logits, batch)


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
    checks.check_transforms("policy_loss_from_logprobs", logprobs)
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
    if objective.beyond_target:
        raise ValueError(
            f"{objective.beyond_target} takes more of a row than its log-probability: "
            "it goes with policy_loss"
        )
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"objective {objective.name} has entropy_coef={objective.entropy_coef} and needs "
            "entropy"
        )
    logprobs = checks.values_of("logprobs", logprobs, like, backend)
    if entropy is not None:
        entropy = checks.values_of("entropy", entropy, like, backend)
    return passes.loss_of_logprobs(logprobs, entropy, batch)


def selected_logprobs(
    logits: Tensor,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    with_entropy: bool = False,
    inplace: bool = False,
    vocab_group: ProcessGroup | VocabShard | None = None,
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
    logit_softcap: as in `policy_loss`.
    kept_ids, kept_offsets: as in `policy_loss`; a target that is none of its row's has NaN.
    with_entropy: also return the entropy in nats.
    inplace: backward overwrites the logits with their gradient; a second reader of the logits then
        fails.
    vocab_group: as in `policy_loss`.
    backend: "auto", or one of `dcpo info`.

    Returns (logprobs, entropy or None), float32: of the shape of target_ids, and [N] or [B, T].

    Raises ValueError or TypeError before any work for arguments that don't fit together, IndexError
    for an id outside the vocabulary (on a GPU: a NaN, or with DCPO_KERNELS_CHECK=1 the error).
    """
    said = {"target_ids": getattr(target_ids, "shape", None), "with_entropy": with_entropy}
    logits, shard = vocab_parallel.split(logits, vocab_group, said)
    backend = checks.check_logits("logits", logits, backend)
    checks.check_transforms("selected_logprobs", logits)
    if inplace:
        checks.check_in_place(logits)
    if kept_ids is not None:
        whole = vocab_parallel.all_columns(logits, shard)
        kept = replay.kept(whole, target_ids, kept_ids, kept_offsets)
        logits, target_ids = replay.kept_logits(logits, kept, inplace, shard), kept.place
        inplace, shard = True, None  # they are a copy
    targets, options = arguments.targets_of(
        logits, target_ids, mask, temperature, logit_softcap, with_entropy, backend
    )
    return passes.logprobs_of(logits, targets, options, inplace, backend, shard)
