"""row_stats: the read alone, for log-probabilities, entropies, and decisions that wait for other
rows."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops.library import check_ids, check_tensors, define
from dcpo_kernels.ops.records import Options, RowStats, Targets, result_dtype, schema_of, unpack


def _results(logits: Tensor, options: Options) -> RowStats:
    def new(shape):
        return logits.new_empty(shape, dtype=result_dtype(logits))

    shape = logits.shape[:-1]
    return RowStats(
        new(shape), new(shape if options.with_entropy else (0,)), new(shape), new(shape)
    )


def _launch(logits, *flat):
    targets, options, (backend,) = unpack(flat, Targets, Options)
    count, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    check_tensors(logits, targets, count)
    check_ids("target_ids", targets.target_ids, vocab, targets.mask)
    stats = _results(logits, options)
    if logits.numel():
        backends.kernels(backend).row_stats(logits, targets, options, stats)
    return tuple(stats)


def _fake(logits, *flat):
    _, options, _ = unpack(flat, Targets, Options)
    return tuple(_results(logits, options))


row_stats = define(
    f"row_stats(Tensor logits, {schema_of(Targets, Options)}, str backend)"
    f" -> ({schema_of(RowStats)})",
    _launch,
    _fake,
)
