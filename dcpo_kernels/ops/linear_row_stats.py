"""linear_row_stats: the read from hidden states. A chunk's logits are made, read, and gone, unless
they are to be kept for linear_row_gradient."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops import head as products
from dcpo_kernels.ops.chosen import Chosen, part_of
from dcpo_kernels.ops.library import check_ids, check_tensors, define, targets_per_row
from dcpo_kernels.ops.records import Head, Options, RowStats, Targets, schema_of, unpack
from dcpo_kernels.ops.row_stats import results_of


def _kept(like: Tensor, keep: bool) -> Tensor:
    rows, vocab = like.shape[:-1].numel(), like.shape[-1]
    return like.new_empty((rows, vocab) if keep else (0,))


@products.plainly
def _launch(hidden, *flat):
    head, targets, options, (keep, backend) = unpack(flat, Head, Targets, Options)
    products.check_head(hidden, head)
    like = products.logits_like(hidden, head)
    count, k = like.shape[:-1].numel(), targets_per_row(like, targets.target_ids)
    check_tensors(like, targets, count, target_ids=count * k)
    check_ids("target_ids", targets.target_ids, like, targets.mask)
    stats, kept = results_of(like, targets, options), _kept(like, keep)

    chosen = Chosen(count, targets.mask)
    rows = chosen.take_states(hidden)
    read, found = chosen.take_each(targets), chosen.room_for(stats)
    parts = products.chunks(chosen.count, hidden, head)
    for part, room in products.rooms(parts, hidden, head, kept if keep else None):
        logits = products.logits_of(rows[part], head, room)
        backends.kernels(backend).row_stats(
            logits, part_of(read, part), options, part_of(found, part)
        )
    chosen.put(stats, found)
    return *stats, kept


def _fake(hidden, *flat):
    head, targets, options, (keep, _) = unpack(flat, Head, Targets, Options)
    like = products.logits_like(hidden, head)
    return *results_of(like, targets, options), _kept(like, keep)


# keep: the logits of the rows that are read, one after the other, are the first of [N, V].
linear_row_stats = define(
    f"linear_row_stats(Tensor hidden, {schema_of(Head, Targets, Options)}, bool keep, str backend)"
    f" -> ({schema_of(RowStats)}, Tensor kept_logits)",
    _launch,
    _fake,
)
