"""row_stats: the read alone, for log-probabilities, entropies, and decisions that wait for other
rows."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops.library import check_ids, check_tensors, define, targets_per_row
from dcpo_kernels.ops.records import Options, RowStats, Targets, result_dtype, schema_of, unpack


def results_of(logits: Tensor, targets: Targets, options: Options) -> RowStats:
    def new(shape):
        return logits.new_empty(shape, dtype=result_dtype(logits))

    shape = logits.shape[:-1]
    return RowStats(
        logprobs=new(targets.target_ids.shape),
        entropy=new(shape if options.with_entropy else (0,)),
        row_max=new(shape),
        log_sum=new(shape),
    )


def _launch(logits, *flat):
    targets, options, (backend,) = unpack(flat, Targets, Options)
    count = logits.shape[:-1].numel()
    k = targets_per_row(logits, targets.target_ids)
    check_tensors(logits, targets, count, target_ids=count * k)
    check_ids("target_ids", targets.target_ids, logits, targets.mask)
    stats = results_of(logits, targets, options)
    if logits.numel():
        backends.kernels(backend).row_stats(logits, targets, options, stats)
    return tuple(stats)


def _fake(logits, *flat):
    targets, options, _ = unpack(flat, Targets, Options)
    return tuple(results_of(logits, targets, options))


row_stats = define(
    f"row_stats(Tensor logits, {schema_of(Targets, Options)}, str backend)"
    f" -> ({schema_of(RowStats)})",
    _launch,
    _fake,
)
