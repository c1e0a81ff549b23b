"""linear_fused: from hidden states to the loss and to all gradients. A chunk's logits are made,
read once and overwritten with their gradient, and two products take that on."""

from __future__ import annotations

from dcpo_kernels import backends
from dcpo_kernels.objective import Numbers
from dcpo_kernels.ops import head as products
from dcpo_kernels.ops.chosen import Chosen, part_of
from dcpo_kernels.ops.fused import check_rows, results_of
from dcpo_kernels.ops.library import define
from dcpo_kernels.ops.records import (
    Head,
    HeadGradients,
    Options,
    Results,
    Rows,
    Tokens,
    Wanted,
    schema_of,
    unpack,
)


@products.plainly
def _launch(hidden, into, *flat):
    head, wanted, rows, tokens, numbers, options, (backend,) = unpack(flat, *_RECORDS)
    products.check_head(hidden, head, into)
    like = products.logits_like(hidden, head)
    check_rows(like, rows, tokens)
    results, written = results_of(like, options)

    chosen = Chosen(like.shape[:-1].numel(), tokens.weights)
    states, found = chosen.take_states(hidden), chosen.room_for(results)
    pulls = chosen.room_for(written)
    # Old logits are as large as those that are not there: a chunk of them at a time.
    chosen_rows = chosen.take_each(rows._replace(old_logits=None))
    chosen_tokens = chosen.take_each(tokens)
    parts = products.chunks(chosen.count, hidden, head)
    backward = products.Backward(states, head, wanted, parts, into)
    for part, room in products.rooms(parts, hidden, head):
        logits = products.logits_of(states[part], head, room)
        part_rows = part_of(chosen_rows, part)
        if rows.old_logits is not None:
            part_rows = part_rows._replace(old_logits=chosen.take_part(rows.old_logits, part))
        backends.kernels(backend).fused(
            logits,
            logits if backward.wanted else None,
            part_rows,
            part_of(chosen_tokens, part),
            numbers,
            options,
            part_of(found, part),
            part_of(pulls, part),
        )
        backward.add(part, logits, pulls.has_gradient[part])
    chosen.put(results, found, ratio=1.0)
    return *results, *backward.gradients(chosen, hidden)


def _fake(hidden, into, *flat):
    head, wanted, _, _, _, options, _ = unpack(flat, *_RECORDS)
    like = products.logits_like(hidden, head)
    results, _ = results_of(like, options)
    return *results, *products.gradients_like(hidden, head, wanted, into)


_RECORDS = (Head, Wanted, Rows, Tokens, Numbers, Options)
linear_fused = define(
    f"linear_fused(Tensor hidden, Tensor(a!)? into, {schema_of(*_RECORDS)}, str backend)"
    f" -> ({schema_of(Results, HeadGradients)})",
    _launch,
    _fake,
)
