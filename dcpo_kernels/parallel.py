"""Batches and sequences over ranks: what one rank needs to know of the others, so that their losses
add up to one process's.

A token's weight is known before any logit is read, so nothing of a row ever travels: one small sum
per optimizer step for a batch that is dealt out to ranks, two numbers per response for responses
that are cut over them. docs/scaling.md has the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_kernels import checks, collectives
from dcpo_kernels.context import lengths_of
from dcpo_kernels.decide import GAMMA, log_ratio_part
from dcpo_kernels.objective import SURROGATES, Objective

if TYPE_CHECKING:  # a torch without distributed has no ProcessGroup
    Group = dist.ProcessGroup | None  # None: all ranks, as in torch.distributed
    Lengths = Tensor | Sequence[int]


class Normalizers(NamedTuple):
    """What `global_normalizers` returns. The first two are arguments of `policy_loss`."""

    num_responses: Tensor  # scalar int64: responses with at least one token, of all ranks
    num_tokens: Tensor  # scalar int64: tokens that count, of all ranks
    scale: int  # what the loss is multiplied with before backward


class PendingNormalizers:
    """Normalizers on their way, while the forward pass runs."""

    def __init__(self, totals: Tensor, work: dist.Work | None, scale: int, group: Group) -> None:
        self._totals, self._work, self._scale, self._group = totals, work, scale, group

    def wait(self) -> Normalizers:
        """On a GPU the stream waits, not the host."""
        if self._work is not None:
            with collectives.named("global_normalizers", self._group):
                self._work.wait()
            self._work = None
        # A batch without any token has a loss of 0, not one divided by 0.
        responses, tokens = self._totals.clamp(min=1)
        return Normalizers(responses, tokens, self._scale)


@overload
def global_normalizers(
    lengths_or_mask: Lengths | Sequence[Lengths],
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    group: Group = None,
    context_group: Group = None,
    averaged: bool = True,
    device: torch.device | str | None = None,
    async_op: Literal[False] = False,
) -> Normalizers: ...
@overload
def global_normalizers(
    lengths_or_mask: Lengths | Sequence[Lengths],
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    group: Group = None,
    context_group: Group = None,
    averaged: bool = True,
    device: torch.device | str | None = None,
    async_op: Literal[True],
) -> PendingNormalizers: ...
def global_normalizers(
    lengths_or_mask: Lengths | Sequence[Lengths],
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    group: Group = None,
    context_group: Group = None,
    averaged: bool = True,
    device: torch.device | str | None = None,
    async_op: bool = False,
) -> Normalizers | PendingNormalizers:
    """Responses and tokens of a whole batch from those of each rank, in one all-reduce of two
    integers. Every rank of the group calls it, once per optimizer step, also one without responses.

        totals = dk.global_normalizers(lengths)
        out = dk.policy_loss(
            ...,
            num_responses=totals.num_responses,
            num_tokens=totals.num_tokens,
            loss_scale=totals.scale,  # saves backward a pass over the gradient
        )
        (out.loss * totals.scale).backward()

    lengths_or_mask: [R] lengths of this rank's packed responses (some may be 0), or a [B, T] mask,
        nonzero where a token counts; or a list of them, one per micro-batch.
    mask: [N] or [1, N], for packed rows of which some don't count; a list where lengths are one.
        Tokens that drop_nonfinite is going to leave out are to be left out here too.
    group: the ranks that the batch is dealt out to.
    context_group: the ranks that each response is cut over, if it is. lengths are then those of
        `whole_responses`, and `group` has to be said: the ranks that hold other responses.
    averaged: DDP, FSDP2 and accelerate average gradients over the ranks, of both groups. The
        gradient of one process is their sum, so `scale` is the number of ranks: whatever the
        aggregation is, also "only-token-mean" and "token-sum", which have no normalizer. False:
        they are added up, and scale is 1.
    device: where the numbers are to be; by default where the input is. Lists are on the CPU, and
        a group of NCCL wants a GPU.
    async_op: return at once what has a wait() for the normalizers.

    Without torch.distributed, or with one rank: this process's numbers, and scale 1. max_length of
    "seq-mean-token-sum-norm" is a constant of the run and needs no collective.
    """
    if context_group is not None and group is None:
        raise ValueError(
            "context_group are the ranks that hold parts of the same responses: pass group too, "
            "the ranks that hold other responses"
        )
    of_one = isinstance(lengths_or_mask, Tensor) or all(
        isinstance(n, Integral) for n in lengths_or_mask
    )
    batches: Any = [lengths_or_mask] if of_one else lengths_or_mask
    masks: Any = repeat(None, len(batches)) if mask is None else [mask] if of_one else mask
    counts = torch.cat([_counts(*both, device) for both in zip(batches, masks, strict=True)])
    totals = torch.stack([(counts > 0).sum(), counts.sum()])
    ranks, work = collectives.size("group", group), None
    parts = 1 if context_group is None else collectives.size("context_group", context_group)
    if ranks > 1:
        with collectives.named("global_normalizers", group):
            work = dist.all_reduce(totals, group=group, async_op=True)
    pending = PendingNormalizers(totals, work, ranks * parts if averaged else 1, group)
    return pending if async_op else pending.wait()


class WholeResponses(NamedTuple):
    """What `whole_responses` returns, by the names of `policy_loss`'s arguments."""

    response_lengths: Tensor  # [R] int64
    response_log_ratio: Tensor | None  # [R] float32; None where each token has a ratio of its own


@torch.no_grad()
def whole_responses(
    lengths_or_mask: Lengths,
    *,
    mask: Tensor | None = None,
    group: Group = None,
    objective: Objective | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    importance_weights: Tensor | None = None,
    device: torch.device | str | None = None,
) -> WholeResponses:
    """What is to be known of whole responses where each rank holds a part of every one (context
    parallelism), in one all-gather. The parts are added up in rank order: every rank has the same
    bits, run after run.

        whole = dk.whole_responses(lengths, mask=mask, group=cp_group)
        out = dk.policy_loss(..., lengths=lengths, mask=mask, **whole._asdict())

    The losses of the ranks add up to that of the whole responses, and so do their gradients.

    lengths_or_mask: [R] rows that this rank has of each packed response (some may be 0), or its
        part of a [B, T] mask. R is the same on all ranks, and so is the order of the responses.
    mask: [N] or [1, N], nonzero where a packed row counts.
    group: the ranks that hold the other parts.
    objective: where it has one ratio per response (gspo, luspo, gmpo, vespo) its log-ratio is made
        too, from per-token values of this rank's rows, as `policy_loss` takes them: logprobs of
        the policy, by `selected_logprobs` without a gradient, and old_logprobs (None: on-policy).
        gmpo also wants advantages, vespo importance_weights if there are any (with a correction
        for another engine's samples multiplied in). Advantages of a response are one number: each
        token has its own part of the gradient, as with ratio_level="sequence-token".
    device: as in `global_normalizers`.

    Raises ValueError on every rank where they disagree on the number of responses or on what kind
    of objective it is; that takes a second message, of 16 bytes. On a GPU it would mean waiting:
    there it is done with DCPO_KERNELS_CHECK=1.
    """
    counts = _counts(lengths_or_mask, mask, device)
    parts = None
    if objective is not None and objective.by_response:
        values = logprobs, old_logprobs, advantages, importance_weights
        parts = _log_ratio_sums(objective, lengths_or_mask, mask, counts, *values)
        counts = counts.to(parts.device, non_blocking=True)
    kind = -1 if parts is None or objective is None else SURROGATES.index(objective.surrogate)
    collectives.check_same(
        "whole_responses", group, counts.device, responses=len(counts), surrogate=kind
    )
    if parts is None:
        return WholeResponses(collectives.gathered("whole_responses", counts, group).sum(0), None)
    # float64 holds a length exactly, and so one message is enough.
    local = torch.stack([counts.to(torch.float64), parts])
    whole = local.new_zeros(local.shape)
    for of_rank in collectives.gathered("whole_responses", local, group):
        whole = whole + of_rank
    lengths, log_ratio = whole
    if kind != GAMMA:
        log_ratio = log_ratio / lengths.clamp(min=1)  # GSPO eq. 7
    return WholeResponses(lengths.to(torch.int64), log_ratio.to(torch.float32))


# ---- counts and sums of one rank ----------------------------------------------------------------


def _counts(
    lengths_or_mask: Lengths, mask: Tensor | None, device: torch.device | str | None
) -> Tensor:
    """[R] int64: tokens of each response that count."""
    if isinstance(lengths_or_mask, Tensor) and lengths_or_mask.dim() == 2:
        if mask is not None:
            raise ValueError("a mask of its own goes with lengths; [B, T] is a mask already")
        counts = (lengths_or_mask != 0).sum(1)
    elif mask is None:
        counts = lengths_of(lengths_or_mask)
    else:
        counted = mask.reshape(-1) != 0
        lengths = _packed(lengths_or_mask, counted)
        ends = lengths.cumsum(0)
        before = torch.cat([ends.new_zeros(1), counted.cumsum(0)])
        counts = before[ends] - before[ends - lengths]
    return counts if device is None else counts.to(device, non_blocking=True)


def _packed(lengths: Lengths, rows: Tensor) -> Tensor:
    """Lengths of rows [N], on their device. On a GPU looking would mean waiting for it."""
    given = lengths_of(lengths)
    if given.device.type == "cpu" and int(given.sum()) != len(rows):
        raise ValueError(f"lengths add up to {int(given.sum())}, but there are {len(rows)} rows")
    return given.to(rows.device, non_blocking=True)


def _log_ratio_sums(
    objective: Objective,
    lengths_or_mask: Lengths,
    mask: Tensor | None,
    counts: Tensor,
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    importance_weights: Tensor | None,
) -> Tensor:
    """[R] float64: this rank's part of the sum that each response's log-ratio is made of."""
    numbers, geometric = objective.numbers, objective.surrogate == "geometric-clip"
    if logprobs is None or (geometric and advantages is None):
        missing = "logprobs" if logprobs is None else "advantages"
        raise ValueError(
            f"objective {objective.name} has one ratio per response, and its log-ratio is made of "
            f"logprobs and old_logprobs{' and advantages' if geometric else ''}: {missing} is "
            "missing"
        )
    like = logprobs.unsqueeze(-1)  # a row of one logit per token, as the checks want it
    if isinstance(lengths_or_mask, Tensor) and lengths_or_mask.dim() == 2:
        mask, lengths = lengths_or_mask, None
    else:
        lengths = _packed(lengths_or_mask, logprobs.reshape(-1))

    def per_token(name: str, x: Tensor | None, nothing: float) -> Tensor:
        if x is None:
            return torch.full_like(logprobs, nothing, dtype=torch.float64)
        x, by_response = checks.per_token_or_response(name, x, like, len(counts), False)
        if not by_response:
            spread = x
        elif lengths is None:
            spread = x.view(-1, 1).expand(logprobs.shape)
        else:
            spread = x.view(-1).repeat_interleave(lengths, output_size=logprobs.numel())
        return spread.to(torch.float64).reshape(logprobs.shape)

    new = checks.floats("logprobs", logprobs, like).to(torch.float64)
    old = new if old_logprobs is None else checks.floats("old_logprobs", old_logprobs, like)
    A = per_token("advantages", advantages, 0.0)
    importance = per_token("importance_weights", importance_weights, 1.0)
    x = log_ratio_part(numbers, new, old, A, importance)
    if mask is not None:  # what stands in other tokens has no effect
        x = torch.where(mask.reshape(x.shape) != 0, x, 0.0)
    if lengths is None:
        return x.sum(1)
    return torch.segment_reduce(x.view(-1), "sum", lengths=lengths, unsafe=True, initial=0.0)
