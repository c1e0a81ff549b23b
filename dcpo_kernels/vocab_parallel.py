"""A vocabulary that is split over ranks: each holds some columns of the logits, or of the head.

Every rank reads its part of a row. One all-gather of a few floats per token then tells all of them
what the whole row's read would have said, so that all decide alike, and each writes its part of the
gradient. Everything that is added up over ranks is added up in rank order on every rank: the same
bits everywhere, run after run.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_kernels.collectives import gathered, named
from dcpo_kernels.ops.library import check_ids
from dcpo_kernels.ops.records import Options, RowStats, Targets, replaced


class VocabShard(NamedTuple):
    """What a rank has of the vocabulary, where its place is not simply after that of the ranks
    before it."""

    group: Any  # a ProcessGroup
    start: int | None = None  # id of the first column; None: earlier ranks' ids come first
    width: int | None = None  # columns that are ids, before those that are padding; None: all


class Shard(NamedTuple):
    """The same once the ranks know of each other."""

    group: Any
    rank: int
    ranks: int
    start: int
    width: int  # columns that are ids; padding comes after them
    vocab: int  # ids of all ranks


# ---- who has what -------------------------------------------------------------------------------


def split(logits: Any, given: Any, said: dict[str, Any]) -> tuple[Tensor, Shard | None]:
    """This rank's logits, and what they are of. given: a group or a VocabShard; or logits are a
    DTensor that is sharded by its last dimension. Neither: all of them, and None."""
    placements = getattr(logits, "placements", None)
    if placements is None and given is None:
        return logits, None
    if placements is not None:
        logits, given = _of_dtensor(logits, placements)
    tokens = logits.shape[:-1].numel()
    return logits, shard_of(logits.shape[-1], given, logits.device, tokens, said)


def _of_dtensor(x: Any, placements: Any) -> tuple[Tensor, VocabShard]:
    """A DTensor's own columns, which lie as torch.chunk cuts them."""
    from torch.distributed.tensor import Replicate, Shard

    axis = [i for i, p in enumerate(placements) if p == Shard(x.dim() - 1)]
    others = [p for i, p in enumerate(placements) if i not in axis]
    if len(axis) != 1 or any(p != Replicate() for p in others):
        raise TypeError(
            f"logits must be a plain tensor, got a DTensor with placements {placements}: one that "
            "is sharded by its vocabulary and by nothing else is taken as it is; else pass "
            "logits.full_tensor(), or logits.to_local() where each rank has whole rows"
        )
    group, vocab = x.device_mesh.get_group(axis[0]), x.shape[-1]
    chunk = -(-vocab // dist.get_world_size(group))
    start = min(chunk * dist.get_rank(group), vocab)
    return x.to_local(), VocabShard(group, start)


def shard_of(
    columns: int, given: Any, device: torch.device, tokens: int, said: dict[str, Any]
) -> Shard:
    """`said` is what all ranks must say alike. On a CPU they tell each other in every call, so that
    a rank that says something else is found before any data is sent. On a GPU reading the answer
    means waiting for it: there they do so once for a group and these columns, to know who has what,
    or in every call with DCPO_KERNELS_CHECK=1."""
    given = given if isinstance(given, VocabShard) else VocabShard(given)
    group, start = given.group, given.start
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    width = columns if given.width is None else given.width
    if not 0 <= width <= columns:
        raise ValueError(f"VocabShard.width={width} is not of the {columns} columns of this rank")
    key = (group, width, start)
    always = device.type == "cpu" or os.environ.get("DCPO_KERNELS_CHECK") == "1"
    if always or key not in _known:
        said = {"tokens": tokens, **said}
        _known[key] = _introduced(group, rank, width, start, device, said)
    starts, widths = _known[key]
    vocab = max(s + w for s, w in zip(starts, widths, strict=True))
    return Shard(group, rank, ranks, starts[rank], width, vocab)


_known: dict[Any, tuple[list[int], list[int]]] = {}


def _same(value: Any) -> str:
    """What does not depend on the process: a function's address does."""
    return value.name if getattr(value, "function", None) is not None else repr(value)


def _introduced(
    group: Any, rank: int, width: int, start: int | None, device: torch.device, said: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """First ids and widths of all ranks."""
    codes = [zlib.crc32(_same(value).encode()) for value in said.values()]
    mine = torch.tensor([width, -1 if start is None else start, *codes], device=device)
    rows = gathered("arguments of a vocabulary over ranks", mine, group).tolist()
    for place, (name, value) in enumerate(said.items(), 2):
        others = [r for r, row in enumerate(rows) if row[place] != rows[rank][place]]
        if others:
            raise ValueError(
                f"rank {rank} of the vocabulary's group was called with {name}={value!r}, rank "
                f"{others[0]} with something else: all ranks must be called alike"
            )
    starts, widths = [row[1] for row in rows], [row[0] for row in rows]
    if min(starts) < 0:
        starts = [sum(widths[:r]) for r in range(len(rows))]
    held = sorted((s, s + w) for s, w in zip(starts, widths, strict=True) if w)
    if held[0][0] != 0 or any(a[1] != b[0] for a, b in itertools.pairwise(held)):
        raise ValueError(f"the ranks' columns are not one vocabulary, each id once: {held}")
    return starts, widths


# ---- what is sent -------------------------------------------------------------------------------


def added(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks in float32, in their order. Each adds up one part of it: as many bytes as
    an all-reduce, and the same bits everywhere."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return x
    what = "the gradient of the hidden states"
    size = -(-x.numel() // ranks)
    flat = x.new_zeros(ranks * size)
    flat[: x.numel()] = x.reshape(-1)
    parts = torch.empty_like(flat)
    with named(what, group):
        dist.all_to_all_single(parts, flat, group=group)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = parts.view(ranks, size).to(wide).sum(0).to(x.dtype)
    return gathered(what, total, group).view(-1)[: x.numel()].view(x.shape)


def all_columns(logits: Tensor, shard: Shard | None) -> Tensor:
    """The shape, dtype and device of the logits with every rank's columns, in the memory of one."""
    if shard is None:
        return logits
    return logits.new_empty(()).expand(*logits.shape[:-1], shard.vocab)


# ---- read ---------------------------------------------------------------------------------------


def local_ids(ids: Tensor, shard: Shard) -> Tensor:
    """The columns of ids that this rank has, -1 for the others."""
    columns = ids - shard.start
    return torch.where((columns >= 0) & (columns < shard.width), columns, -1)


def whole_stats(
    read: Callable[[Targets], RowStats],
    targets: Targets,
    rows: torch.Size,
    options: Options,
    shard: Shard,
) -> RowStats:
    """Of whole rows, from what reads this rank's part of them.

    With m, l and H the row_max, log_sum and entropy of the ranks' parts, M the highest m and
    s = exp((m - M) / T + l): log_sum = log sum s; a part has the probability w = s / sum s, and the
    entropy is sum w (H - log w).
    """
    like = targets.target_ids.new_empty(()).expand(*rows, shard.vocab)
    check_ids("target_ids", targets.target_ids, like, targets.mask)
    columns = local_ids(targets.target_ids, shard)
    if shard.width:
        stats = read(Targets(columns.clamp(min=0), targets.mask, targets.temperatures))
    else:
        nothing = torch.zeros(rows, device=columns.device)
        lowest = torch.full_like(nothing, -torch.inf)
        stats = RowStats(torch.zeros_like(columns, dtype=lowest.dtype), nothing, lowest, lowest)
    own_sum = stats.log_sum.view(*rows, *[1] * (columns.dim() - len(rows)))
    above_max = torch.where(columns >= 0, stats.logprobs + own_sum, -torch.inf)  # (x - m) / T
    sent = [stats.row_max, stats.log_sum, *([stats.entropy] if options.with_entropy else [])]
    sent = torch.cat([torch.stack(sent), above_max.view(*rows, -1).movedim(-1, 0)])
    row_maxima, log_sums, *rest = gathered(
        "what was read of the vocabulary", sent, shard.group
    ).unbind(1)

    row_max = row_maxima.amax(0)
    T = options.temperature if targets.temperatures is None else targets.temperatures
    T = T.view(rows) if isinstance(T, Tensor) else T
    shift = (row_maxima - torch.where(row_max == -torch.inf, 0.0, row_max)) / T
    # Without the 1 of the highest, which would take the digits of all that is beside it.
    first = torch.arange(shard.ranks, device=shift.device).view(-1, *[1] * len(rows))
    first = first == row_maxima.argmax(0)
    parts = torch.where(first, torch.expm1(log_sums), (shift + log_sums).exp())
    log_sum = torch.log1p(parts.sum(0))
    entropy = stats.entropy
    if options.with_entropy:
        log_w = shift + log_sums - log_sum
        w = log_w.exp()
        entropy = torch.where(w == 0, 0.0, w * (rest.pop(0) - log_w)).sum(0)
    of_targets = torch.stack(rest, -1) + shift[..., None]
    logprobs = of_targets.amax(0) - log_sum[..., None]
    outside = (targets.target_ids < 0) | (targets.target_ids >= shard.vocab)
    logprobs = torch.where(outside.view(logprobs.shape), torch.nan, logprobs)
    whole = RowStats(logprobs, entropy, row_max, log_sum)
    if targets.mask is None:
        return replaced(whole, logprobs=logprobs.view(columns.shape))
    read_rows = targets.mask.view(rows) != 0

    def of_rows_read(x: Tensor) -> Tensor:
        return torch.where(read_rows if x.dim() == len(rows) else read_rows[..., None], x, 0.0)

    whole = RowStats(*(of_rows_read(x) if x.numel() else x for x in whole))
    return replaced(whole, logprobs=whole.logprobs.view(columns.shape))
