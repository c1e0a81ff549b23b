"""Sampling replay: log-probabilities under the truncated distribution (top-k, top-p) that a rollout
really sampled from.

Only the kept logits of a row are gathered and read: the losses run on them as on a small
vocabulary, and the gradient is zero elsewhere.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.vocab_parallel import Shard, gathered, local_ids


class Kept(NamedTuple):
    """The kept ids of each row, and its target among them."""

    ids: Tensor  # [.., S] int64; the padding holds the row's first
    padding: Tensor  # [.., S] bool
    place: Tensor  # [..] int64, of the target; 0 where it is none of them
    found: Tensor  # [..] bool: it is one


class _Gather(torch.autograd.Function):
    """[.., V] to [.., S], at ids whose gradient is the same wherever they come again."""

    @staticmethod
    def forward(ctx, logits, ids, inplace):
        ctx.save_for_backward(ids, *[logits] * inplace)
        ctx.shape, ctx.inplace = logits.shape, inplace
        return logits.gather(-1, ids)

    @staticmethod
    def backward(ctx, gradient):
        ids, *logits = ctx.saved_tensors
        if not ctx.inplace:
            whole = gradient.new_zeros(ctx.shape)
            return whole.scatter_(-1, ids, gradient), None, None
        whole = logits[0].detach().zero_().scatter_(-1, ids, gradient)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(whole)
        return whole, None, None


class _GatherParts(torch.autograd.Function):
    """The same where each rank has some of the columns: every rank gets all of them."""

    @staticmethod
    def forward(ctx, logits, ids, shard):
        own = local_ids(ids, shard)
        ctx.save_for_backward(own)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        if shard.width:
            found = torch.where(own >= 0, logits.gather(-1, own.clamp(min=0)), -torch.inf)
        else:
            found = logits.new_full(ids.shape, -torch.inf)
        return gathered(found, shard.group, "the kept logits").amax(0)

    @staticmethod
    def backward(ctx, gradient):
        (own,) = ctx.saved_tensors
        *rows, columns = ctx.shape
        whole = gradient.new_zeros(*rows, columns + 1)  # the last is for what other ranks have
        whole.scatter_(-1, torch.where(own < 0, columns, own), gradient)
        return whole[..., :columns], None, None


class _Padded(torch.autograd.Function):
    """-inf in the padding, NaN in rows whose target was not found. The padding passes on what the
    row's first id gets, whose place it has: so each place has one gradient, whatever the order."""

    @staticmethod
    def forward(ctx, values, padding, found):
        ctx.save_for_backward(padding)
        values = values.masked_fill(padding, -torch.inf)
        return torch.where(found[..., None], values, torch.nan)

    @staticmethod
    def backward(ctx, gradient):
        (padding,) = ctx.saved_tensors
        first = (~padding).to(torch.int64).argmax(-1, keepdim=True)
        return torch.where(padding, gradient.gather(-1, first), gradient), None, None


def kept_logits(logits: Tensor, kept: Kept, inplace: bool, shard: Shard | None) -> Tensor:
    """[.., S]"""
    if shard is None:
        return padded(_Gather.apply(logits, kept.ids, inplace), kept)
    return padded(_GatherParts.apply(logits, kept.ids, shard), kept)


def padded(values: Tensor, kept: Kept) -> Tensor:
    return _Padded.apply(values, kept.padding, kept.found)


def kept(logits: Tensor, target_ids: Tensor, kept_ids: Tensor, kept_offsets: Tensor | None) -> Kept:
    rows = logits.shape[:-1]
    for name, x in (("kept_ids", kept_ids), ("kept_offsets", kept_offsets)):
        if x is not None and (not isinstance(x, Tensor) or x.dtype not in _IDS):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of int64 or int32, got {got}")
    if kept_offsets is not None:
        kept_ids = _in_rows(kept_ids, kept_offsets, rows)
    if kept_ids.shape[:-1] != rows or kept_ids.dim() != logits.dim() or not kept_ids.shape[-1]:
        raise ValueError(
            f"kept_ids must be {[*rows, 'S']} with S >= 1 (padded with -1), or [M] with "
            f"kept_offsets [{rows.numel() + 1}]; got {list(kept_ids.shape)}"
        )
    if list(target_ids.shape) != list(rows):
        raise ValueError(
            f"target_ids must have one value per token, shape {list(rows)}, got "
            f"{list(target_ids.shape)}"
        )
    ids = kept_ids.to(torch.int64)
    _check_ids(ids, logits.shape[-1])
    is_target = ids == target_ids[..., None]
    padding = ids < 0
    first = (~padding).to(torch.int64).argmax(-1, keepdim=True)
    return Kept(
        ids=torch.where(padding, ids.gather(-1, first), ids).clamp(min=0),
        padding=padding,
        place=is_target.to(torch.int64).argmax(-1),
        found=is_target.any(-1) & (target_ids >= 0),
    )


_IDS = (torch.int64, torch.int32)


def _in_rows(kept_ids: Tensor, kept_offsets: Tensor, rows: torch.Size) -> Tensor:
    """From one list for all rows (as vLLM returns it) to [.., S]. Waits for the device once: S is
    the longest."""
    if kept_ids.dim() != 1 or kept_offsets.shape != (rows.numel() + 1,):
        raise ValueError(
            f"with kept_offsets [{rows.numel() + 1}], kept_ids must be [M]; got kept_offsets "
            f"{list(kept_offsets.shape)} and kept_ids {list(kept_ids.shape)}"
        )
    sizes = kept_offsets.diff()
    longest = int(sizes.max()) if sizes.numel() else 1
    if sizes.numel() and (int(sizes.min()) < 0 or int(kept_offsets[-1]) > len(kept_ids)):
        raise ValueError(
            f"kept_offsets must rise from 0 to at most {len(kept_ids)}, the number of kept_ids"
        )
    column = torch.arange(max(longest, 1), device=kept_ids.device)
    at = (kept_offsets[:-1, None] + column).clamp(max=max(len(kept_ids) - 1, 0))
    inside = column < sizes[:, None]
    values = kept_ids[at] if len(kept_ids) else at
    return torch.where(inside, values, -1).view(*rows, -1)


def _check_ids(ids: Tensor, vocab: int) -> None:
    """IndexError for an id outside the vocabulary, ValueError for one that a row has twice. Looked
    at where that means no waiting, as for other ids."""
    if ids.device.type != "cpu" and os.environ.get("DCPO_KERNELS_CHECK") != "1":
        return
    if torch.compiler.is_compiling() or not ids.numel():
        return
    bad = (ids < -1) | (ids >= vocab)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise IndexError(
            f"kept_ids{at} is {int(ids[tuple(at)])}, outside the vocabulary of {vocab} (-1 is "
            "padding)"
        )
    in_order = ids.sort(-1).values
    twice = (in_order.diff(dim=-1) == 0) & (in_order[..., 1:] >= 0)
    if twice.any():
        *row, k = twice.nonzero()[0].tolist()
        raise ValueError(f"kept_ids{row} has the id {int(in_order[(*row, k)])} more than once")
