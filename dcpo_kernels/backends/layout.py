"""How rows lie in a tensor of logits."""

from __future__ import annotations

from torch import Tensor


def row_count(logits: Tensor) -> int:
    """Rows of [N, V] or [B, T, V] logits."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[1]


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(per_batch, batch_stride, row_stride): row i begins at (i // per_batch) * batch_stride + (i %
    per_batch) * row_stride elements. So a slice such as logits[:, :-1] is taken as it is."""
    if x.dim() == 2:
        return max(x.shape[0], 1), 0, x.stride(0)
    return max(x.shape[1], 1), x.stride(0), x.stride(1)
