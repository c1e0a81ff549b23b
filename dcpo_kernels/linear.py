"""From hidden states and the weight of the vocabulary projection, without the logits of a whole
batch: `linear_policy_loss` and `linear_selected_logprobs`.

Logits exist a chunk of rows at a time. Our pass overwrites them with their gradient, which two
products take to the hidden states and to the weight: three products for a loss, as with logits that
fit. Rows that do not count cost none of them, rows that came out without a gradient only the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcpo_kernels import arguments, backends, checks, linear_passes, passes, replay
from dcpo_kernels.function import TokenLoss
from dcpo_kernels.linear_passes import Linear
from dcpo_kernels.objective import Objective
from dcpo_kernels.ops.head import logits_like
from dcpo_kernels.passes import PolicyLoss
from dcpo_kernels.vocab_parallel import VocabShard, all_columns, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
    weight_grad: Tensor | None = None,
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
    vocab_group: ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """`policy_loss` of the logits softcap(logit_scale * (hidden @ weight.T + bias)), with gradients
    to hidden, weight and bias, whichever ask for one.

    hidden: [N, D] or [1, N, D] packed, [B, T, D] padded; bf16, fp16 or fp32.
    weight: [V, D], as nn.Linear and nn.Embedding have it, of hidden's dtype (under autocast both
        become autocast's). Its gradient is summed up in float32 and rounded once. A DTensor is
        gathered, once, and its gradient averaged over the ranks as FSDP2 does.
    bias: [V].
    logit_scale, logit_softcap: the model's own: logits = softcap * tanh(scale * x / softcap)
        (Gemma 2, arXiv 2408.00118); part of the read and the write.
    logits_dtype: torch.float32 keeps the logits of a 16-bit product unrounded, for a smaller
        mismatch with an engine that does. None: hidden's dtype.
    memory_limit: bytes that the logits of one chunk may take, at least one row. None: as many as
        the float32 gradient of the weight, 4 * V * D, or 256 MiB where that is more. Results depend
        on it by rounding alone.
    weight_grad: [V, D], float32 or of weight's dtype, such as weight.main_grad or weight.grad: the
        gradient is added to it in the forward pass, without a buffer of its own, and weight has
        none from autograd. backward must then bring exactly loss_scale, or 1: anything else raises
        on a CPU, and makes the other gradients NaN on a GPU.
    vocab_group: weight and bias are this rank's rows of the whole; hidden is the same on all ranks,
        and so is its gradient, which is added up over them. A weight that is a DTensor stays
        sharded over this group and is gathered over its other dimensions.
    The others, and what is returned, as in `policy_loss`.

    All gradients are made in the forward pass, so backward runs once. Objectives with a ratio per
    response, and functions, read everything before they write: they make the logits twice where
    memory_limit does not hold all of them. On a GPU the number of rows that count, and per chunk of
    those with a gradient, is waited for; under CUDA graph capture no row is left out.
    """
    objective, found = arguments.objective_of(objective), None
    linear, backend = _linear(
        hidden,
        weight,
        bias,
        logit_scale,
        logits_dtype,
        memory_limit,
        weight_grad,
        vocab_group,
        {"objective": objective, "with_entropy": with_entropy},
        backend,
    )
    checks.check_transforms("linear_policy_loss", hidden)
    if linear.shard is not None and objective.needs_old_logits:
        raise ValueError(
            f"objective {objective.name} compares whole rows: with vocab_group= it goes with "
            "policy_loss, from this rank's logits"
        )
    like = all_columns(logits_like(linear.hidden, linear.head), linear.shard)
    kept_logits = None
    if kept_ids is not None:
        if objective.beyond_target:
            raise ValueError(
                f"kept_ids go with what looks at the sampled token alone, and objective "
                f"{objective.name} has {objective.beyond_target}"
            )
        kept = replay.kept(like, target_ids, kept_ids, kept_offsets)
        gathered = linear_passes.gathered(linear, kept.ids, _mask_of(mask, like))
        like = kept_logits = replay.padded(gathered, kept)
        target_ids, found = kept.place, kept.found
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
        skip_zero_advantage=skip_zero_advantage,
        drop_nonfinite=drop_nonfinite,
        found=found,
        backend=backend,
    )
    batch = arguments.with_rows(
        batch,
        like,
        target_ids,
        temperature=_unscaled(temperature, logit_scale),
        logit_softcap=_unscaled(logit_softcap, logit_scale),
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        old_logits=old_logits,
        loss_scale=loss_scale,
        with_entropy=with_entropy,
        inplace=kept_logits is not None,
    )
    if kept_logits is not None:
        return passes.loss_of_logits(kept_logits, batch)
    return linear_passes.loss_of_linear(linear, batch)


def linear_selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
    weight_grad: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    with_entropy: bool = False,
    vocab_group: ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`selected_logprobs` from hidden states: (logprobs, entropy or None), both differentiable.

    hidden, weight, bias, logit_scale, logit_softcap, logits_dtype, memory_limit: as in
        `linear_policy_loss`; the others as in `selected_logprobs`.
    weight_grad: as there, but the gradient is added to it in backward, whatever comes from above.

    Where a gradient is asked for, backward runs once. It makes the logits again, of the rows that
    have a gradient, unless memory_limit holds all of them: then the forward pass keeps them.
    """
    linear, backend = _linear(
        hidden,
        weight,
        bias,
        logit_scale,
        logits_dtype,
        memory_limit,
        weight_grad,
        vocab_group,
        {"target_ids": getattr(target_ids, "shape", None), "with_entropy": with_entropy},
        backend,
    )
    checks.check_transforms("linear_selected_logprobs", hidden)
    like = all_columns(logits_like(linear.hidden, linear.head), linear.shard)
    temperature = _unscaled(temperature, logit_scale)
    logit_softcap = _unscaled(logit_softcap, logit_scale)
    if kept_ids is not None:
        kept = replay.kept(like, target_ids, kept_ids, kept_offsets)
        gathered = linear_passes.gathered(linear, kept.ids, _mask_of(mask, like))
        logits = replay.padded(gathered, kept)
        targets, options = arguments.targets_of(
            logits, kept.place, mask, temperature, logit_softcap, with_entropy, backend
        )
        return passes.logprobs_of(logits, targets, options, True, backend)
    like.requires_grad_(linear_passes.wants_gradient(linear))
    targets, options = arguments.targets_of(
        like, target_ids, mask, temperature, logit_softcap, with_entropy, backend
    )
    return linear_passes.logprobs_of_linear(linear, targets, options, backend)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    memory_limit: int | None,
    weight_grad: Tensor | None,
    vocab_group: ProcessGroup | VocabShard | None,
    said: dict[str, Any],
    backend: str,
) -> tuple[Linear, str]:
    """What is said of the projection, and the backend that serves its logits."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) and (x is not None or name != "bias"):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if placements := getattr(hidden, "placements", None):
        raise TypeError(
            f"hidden must be a plain tensor, got a DTensor with placements {placements}: "
            "pass hidden.full_tensor(), or hidden.to_local() where each rank has whole rows"
        )
    if hidden.dim() not in (2, 3):
        raise ValueError(
            f"hidden must be packed [N, D] or padded [B, T, D], got shape {list(hidden.shape)}"
        )
    weight = _own_rows(weight, vocab_group)
    bias = None if bias is None else _own_rows(bias, vocab_group)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as F.linear has it
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    backend = backends.choose(backend, device)
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or (0 in weight.shape and not vocab_group):
        raise ValueError(
            f"weight must be [V, {width}] for hidden {list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    checks.check_dtype("hidden", hidden, backend)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise TypeError(
                f"{name} must be {hidden.dtype} on {hidden.device} as hidden is, got {x.dtype} on "
                f"{x.device}"
            )
    if logits_dtype not in (None, hidden.dtype, torch.float32):
        raise TypeError(
            f"logits_dtype must be torch.float32 or hidden's {hidden.dtype}, got {logits_dtype}"
        )
    if not isinstance(logit_scale, Real) or not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale={logit_scale} must be a number > 0")
    if memory_limit is None:
        memory_limit = default_limit(weight)
    elif not isinstance(memory_limit, int) or memory_limit < 1:
        raise ValueError(f"memory_limit={memory_limit} must be bytes, an integer > 0")
    if weight_grad is not None:
        _check_weight_grad(weight_grad, weight)
    shard, into = None, weight_grad
    if vocab_group is not None:
        tokens = hidden.shape[:-1].numel()
        shard = shard_of(len(weight), vocab_group, hidden.device, tokens, said)
        own = slice(shard.width)  # rows of padding come after them
        weight, bias = weight[own], None if bias is None else bias[own]
        into = None if into is None else into[own]
    wide = logits_dtype == torch.float32
    return Linear(hidden, weight, bias, wide, memory_limit, into, shard), backend


def default_limit(weight: Tensor) -> int:
    """What memory_limit=None is: the bytes of the weight's gradient in float32, or 256 MiB."""
    return max(4 * weight.numel(), 2**28)


def _mask_of(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else checks.mask_of(mask, like)


def _check_weight_grad(weight_grad: Tensor, weight: Tensor) -> None:
    if not isinstance(weight_grad, Tensor):
        raise TypeError(f"weight_grad must be a tensor, got {type(weight_grad).__name__}")
    dtypes = (torch.float32, weight.dtype)
    if (
        weight_grad.shape != weight.shape
        or weight_grad.device != weight.device
        or weight_grad.dtype not in dtypes
        or weight_grad.requires_grad
    ):
        raise ValueError(
            f"weight_grad must be {list(weight.shape)} on {weight.device}, float32 or "
            f"{weight.dtype}, and need no gradient; got {list(weight_grad.shape)} on "
            f"{weight_grad.device}, {weight_grad.dtype}"
        )


def _own_rows(weight: Any, vocab_group: ProcessGroup | VocabShard | None) -> Tensor:
    """A sharded weight as this rank needs it: gathered, but for the vocabulary's group. Over the
    ranks that it was gathered from its gradient is averaged, as FSDP2 does with that of every other
    parameter."""
    placements = getattr(weight, "placements", None)
    if placements is None:
        return weight
    from torch.distributed.tensor import Partial, Replicate, Shard

    group = vocab_group.group if isinstance(vocab_group, VocabShard) else vocab_group
    mesh = weight.device_mesh
    kept = [group is not None and mesh.get_group(i) == group for i in range(mesh.ndim)]
    rows = [Shard(0) if keep else Replicate() for keep in kept]
    gradients = [Shard(0) if keep else Partial("avg") for keep in kept]
    return weight.redistribute(placements=rows).to_local(grad_placements=gradients)


def _unscaled(x: Any, logit_scale: float) -> Any:
    """A temperature or a soft cap for what is not yet scaled: with c the cap and s the scale,
    c tanh(s x / c) / T is (c / s) tanh(x / (c / s)) / (T / s)."""
    return x if logit_scale == 1.0 or not isinstance(x, (Real, Tensor)) else x / logit_scale
