"""linear_gather, linear_gather_gradient: some logits of each row from hidden states, for sampling
replay. A chunk of them is made, gathered from, and gone; the gradient needs none of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels.ops import head as products
from dcpo_kernels.ops.chosen import Chosen
from dcpo_kernels.ops.library import define
from dcpo_kernels.ops.records import Head, HeadGradients, Wanted, schema_of, unpack


def _check(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> None:
    products.check_head(hidden, head)
    if ids.dim() != hidden.dim() or ids.shape[:-1] != hidden.shape[:-1] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 {[*hidden.shape[:-1], 'S']}, got {list(ids.shape)}")
    if mask is not None and mask.shape != hidden.shape[:-1]:
        raise ValueError(f"mask must be {list(hidden.shape[:-1])}, got {list(mask.shape)}")


def _values(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    return hidden.new_zeros(ids.shape, dtype=products.logits_dtype(hidden, head))


@products.plainly
def _launch(hidden, *flat):
    head, (ids, mask) = unpack(flat, Head)
    _check(hidden, head, ids, mask)
    values, size = _values(hidden, head, ids), ids.shape[-1]
    chosen = Chosen(ids.shape[:-1].numel(), mask)
    rows, places = chosen.take_states(hidden), chosen.take_states(ids)
    found = values.new_empty(chosen.count, size)
    for part, room in products.rooms(products.chunks(chosen.count, hidden, head), hidden, head):
        logits = products.logits_of(rows[part], head, room)
        torch.gather(logits, -1, places[part], out=found[part])
    whole = values.view(-1, size)
    return (
        whole.copy_(found).view(ids.shape)
        if chosen.rows is None
        else (whole.index_copy_(0, chosen.rows, found).view(ids.shape))
    )


def _fake(hidden, *flat):
    head, (ids, _) = unpack(flat, Head)
    return _values(hidden, head, ids)


@products.plainly
def _launch_gradient(hidden, gradient, into, *flat):
    head, wanted, (ids,) = unpack(flat, Head, Wanted)
    _check(hidden, head, ids, None)
    chosen = Chosen(ids.shape[:-1].numel(), (gradient != 0).any(-1))
    rows, places = chosen.take_states(hidden), chosen.take_states(ids)
    of_values = chosen.take_states(gradient)
    parts = products.chunks(chosen.count, hidden, head)
    backward = products.Backward(rows, head, wanted, parts, into)
    for part, room in products.rooms(parts, hidden, head):
        logits = room.zero_().scatter_(-1, places[part], of_values[part].to(room.dtype))
        backward.add(part, logits, None)
    return tuple(backward.gradients(chosen, hidden))


def _fake_gradient(hidden, gradient, into, *flat):
    head, wanted, _ = unpack(flat, Head, Wanted)
    return tuple(products.gradients_like(hidden, head, wanted, into))


# ids: [.., S] int64, within the vocabulary. Rows where the mask is 0 hold 0.
linear_gather = define(
    f"linear_gather(Tensor hidden, {schema_of(Head)}, Tensor ids, Tensor? mask) -> Tensor",
    _launch,
    _fake,
)
# An id that a row has more than once must have the same gradient each time.
linear_gather_gradient = define(
    f"linear_gather_gradient(Tensor hidden, Tensor gradient, Tensor(a!)? into, "
    f"{schema_of(Head, Wanted)}, Tensor ids) -> ({schema_of(HeadGradients)})",
    _launch_gradient,
    _fake_gradient,
)
