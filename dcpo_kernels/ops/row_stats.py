"""row_stats: the read alone, for log-probabilities, entropies, and decisions that wait for other
rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.backends.layout import row_count
from dcpo_kernels.ops.library import check_ids, define


def _results(logits: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    rows = row_count(logits)

    def new(size):
        return torch.empty(size, dtype=torch.float32, device=logits.device)

    return new(rows), new(rows if with_entropy else 0), new(rows), new(rows)


def _launch(logits, target_ids, counts, temperature, with_entropy, backend):
    check_ids(target_ids, counts, logits.shape[-1], "target_ids")
    out = _results(logits, with_entropy)
    if logits.numel():
        backends.kernels(backend, logits.device.type).row_stats(
            logits, target_ids, counts, temperature, *out
        )
    return out


def _fake(logits, target_ids, counts, temperature, with_entropy, backend):
    return _results(logits, with_entropy)


# target_ids [N] int64; counts [N] bool, rows that are read (the others give 0; None: all are).
# lse = row_max / temperature + log_sum, in two parts: added up, a row shifted by 1e4 would lose
# four digits.
row_stats = define(
    "row_stats(Tensor logits, Tensor target_ids, Tensor? counts, float temperature, bool "
    "with_entropy, str backend)"
    " -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum)",
    _launch,
    _fake,
)
