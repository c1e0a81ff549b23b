"""The layouts of context parallelism: which rows of a batch a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcpo_kernels import checks


class ContextRows(NamedTuple):
    """What `context_rows` returns: n rows of one rank."""

    rows: Tensor  # [n] int64: which row of the whole batch each of them is, -1 for padding
    lengths: Tensor  # [R] int64: rows of each sequence, with its padding; may hold zeros
    mask: Tensor  # [n] bool: it is no padding


def context_rows(
    lengths: Tensor | Sequence[int],
    layout: str,
    *,
    rank: int,
    world: int,
    multiple: int = 1,
    device: torch.device | str | None = None,
) -> ContextRows:
    """Which rows of a packed batch a rank holds under context parallelism.

        here = dk.context_rows(lengths, "zigzag", rank=rank, world=world)
        mask = here.mask & mask[here.rows]
        whole = dk.whole_responses(here.lengths, mask=mask, group=group)

    lengths: [R] rows of each whole sequence, prompts included, known on the host. Targets are
        shifted before the cut: row t of the logits predicts target_ids[t]. Of a padded batch
        [B, T] pass [T]: rows are then the columns that a rank holds of every response.
    layout: "contiguous": the batch, padded at its end, is cut into `world` pieces (slime's
        allgather-CP; torchtitan without a load balancer).
        "zigzag": each sequence, padded at its end, is cut into 2 * world chunks, and rank r holds
        chunks r and 2 * world - 1 - r (Megatron, slime, torchtitan), which gives every rank as
        much of a causal attention.
    multiple: a rank's rows are filled up to a multiple of it. These are counted with the last
        sequence.

    Padding has the row -1, which as an index is the last row; the mask leaves it out.
    """
    given = lengths_of(lengths)
    if not 0 <= rank < world or multiple < 1:
        raise ValueError(f"rank={rank} must be in 0..{world - 1}, multiple={multiple} at least 1")
    n = given.cpu()
    ends, total = n.cumsum(0), int(n.sum())
    if layout == "contiguous":
        count = _filled(total, world * multiple) // world
        rows = torch.arange(rank * count, (rank + 1) * count)
        rows = torch.where(rows < total, rows, -1)
        first, last = (min(i * count, total) for i in (rank, rank + 1))
        local = ends.clamp(first, last) - (ends - n).clamp(first, last)
    elif layout == "zigzag":
        chunks = -(-n // (2 * world))
        local = 2 * chunks
        owner = torch.arange(len(n)).repeat_interleave(local)
        at = torch.arange(len(owner)) - (local.cumsum(0) - local)[owner]
        chunk = chunks[owner]
        before = torch.where(at < chunk, rank, 2 * world - 2 - rank)  # chunks that are not here
        at = at + before * chunk
        rows = torch.where(at < n[owner], at + (ends - n)[owner], -1)
        rows = F.pad(rows, (0, _filled(len(rows), multiple) - len(rows)), value=-1)
    else:
        raise ValueError(f"layout={layout!r} is not one of contiguous, zigzag")
    if len(n):
        local[-1] += len(rows) - local.sum()
    to = given.device if device is None else device
    return ContextRows(rows.to(to), local.to(to), (rows >= 0).to(to))


def lengths_of(given: Tensor | Sequence[int]) -> Tensor:
    """[R] int64"""
    lengths = checks.integers("lengths", given)
    if lengths.dim() != 1 or lengths.dtype not in checks.INTEGERS:
        raise ValueError(
            f"lengths must be integers of shape [R], got {lengths.dtype} of shape "
            f"{list(lengths.shape)}"
        )
    return lengths.to(torch.int64)


def _filled(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple
