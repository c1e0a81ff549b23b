"""linear_row_gradient: the write from hidden states. Logits are made again, or were kept; rows
whose coefficients are 0 cost no product."""

from __future__ import annotations

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops import head as products
from dcpo_kernels.ops.chosen import Chosen, part_of
from dcpo_kernels.ops.library import check_scalar, check_tensors, define, targets_per_row
from dcpo_kernels.ops.records import (
    Head,
    HeadGradients,
    RowCoefficients,
    Wanted,
    schema_of,
    unpack,
)
from dcpo_kernels.ops.row_gradient import write_part


def _pulled(coefficients: RowCoefficients, count: int, k: int) -> Tensor:
    """[N] bool: the row has a gradient."""
    pulled = (coefficients.g != 0).view(count, k).any(-1)
    return pulled if coefficients.h is None else pulled | (coefficients.h.view(-1) != 0)


@products.plainly
def _launch(hidden, kept, into, *flat):
    head, wanted, coefficients, rest = unpack(flat, Head, Wanted, RowCoefficients)
    mask, factor, temperature, softcap, split, backend = rest
    products.check_head(hidden, head, into)
    like = products.logits_like(hidden, head)
    count, k = like.shape[:-1].numel(), targets_per_row(like, coefficients.target_ids)
    check_tensors(like, coefficients, count, target_ids=count * k, g=count * k)
    if factor is not None:
        check_scalar(like, factor)

    pulled = _pulled(coefficients, count, k)
    chosen = Chosen(count, pulled if kept is None else mask)
    rows, chosen_coefficients = chosen.take_states(hidden), chosen.take_each(coefficients)
    has_gradient = None if kept is None else chosen.take(pulled)
    parts = products.chunks(chosen.count, hidden, head)
    backward = products.Backward(rows, head, wanted, parts, into)

    def write(logits: Tensor, c: RowCoefficients) -> None:
        kernels = backends.kernels(backend)
        kernels.row_gradient(logits, logits, c, factor, temperature, softcap)

    for part, room in products.rooms(parts, hidden, head, kept):
        logits = room if kept is not None else products.logits_of(rows[part], head, room)
        of_part = part_of(chosen_coefficients, part)
        if split:
            write_part(write, logits, of_part)
        else:
            write(logits, of_part)
        backward.add(part, logits, None if has_gradient is None else has_gradient[part])
    return tuple(backward.gradients(chosen, hidden))


def _fake(hidden, kept, into, *flat):
    head, wanted, _, _ = unpack(flat, Head, Wanted, RowCoefficients)
    return tuple(products.gradients_like(hidden, head, wanted, into))


# kept_logits: what linear_row_stats kept with this mask; overwritten. split: the weight has some
# rows of a vocabulary, and a target of -1 is none of them.
linear_row_gradient = define(
    f"linear_row_gradient(Tensor hidden, Tensor(a!)? kept_logits, Tensor(b!)? into, "
    f"{schema_of(Head, Wanted, RowCoefficients)}, Tensor? mask, Tensor? factor, float temperature, "
    f"float softcap, bool split, str backend) -> ({schema_of(HeadGradients)})",
    _launch,
    _fake,
)
