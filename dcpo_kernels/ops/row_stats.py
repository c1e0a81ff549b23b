"""row_stats: the read alone, for log-probabilities, entropies, and decisions that wait for other
rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops.library import check_ids, check_tensors, define
from dcpo_kernels.ops.records import Options, result_dtype, schema_of, unpack


class Targets(NamedTuple):
    """Which rows are read, and for what."""

    target_ids: Tensor  # [N] int64
    mask: Tensor | None  # [N] bool or uint8; the results of other rows are 0; None: all are read
    temperatures: Tensor | None  # [N] float32; None: Options.temperature for all of them


class RowStats(NamedTuple):
    """lse = row_max / temperature + log_sum, in two parts: added up, a row shifted by 1e4 would
    lose four digits. [N] float32, float64 for float64 logits."""

    logprobs: Tensor
    entropy: Tensor  # [0] unless asked for
    row_max: Tensor
    log_sum: Tensor


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
