"""token_weights: from a mask or lengths to the weight of every token, and from one value per
response to one per token."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.ops.library import check_tensors, define
from dcpo_kernels.ops.records import Grouping, Responses, Value, schema_of, unpack
from dcpo_kernels.responses import check_totals


def _responses(shape, grouping: Grouping, device: torch.device) -> Responses:
    count = shape[0] if grouping.lengths is None else grouping.lengths.shape[0]
    offsets = torch.empty(count + 1, dtype=torch.int64, device=device)
    return Responses(
        weights=offsets.new_empty(shape, dtype=torch.float32),
        mask=offsets.new_empty(shape, dtype=torch.bool),
        offsets=offsets,
        lengths=offsets.new_empty(count),
    )


def _spread(shape, values: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(shape) for x in values]


def _launch(like, *flat):
    grouping, (values, backend) = unpack(flat, Grouping)
    shape, device = like.shape, like.device
    responses = _responses(shape, grouping, device)
    count = responses.lengths.numel()
    skip_count = count if grouping.skip_by_response else shape.numel()
    check_tensors(
        responses.weights,
        grouping,
        1,
        mask=shape.numel(),
        lengths=count,
        response_lengths=count,
        weights=shape.numel(),
        skip_zero=skip_count,
    )
    for x in values:
        check_tensors(responses.weights, Value(x), count)
    spread = _spread(shape, values)
    backends.kernels(backend).token_weights(grouping, values, responses, spread)
    check_totals(grouping, responses.lengths)
    return *responses, spread


def _fake(like, *flat):
    grouping, (values, _) = unpack(flat, Grouping)
    return *_responses(like.shape, grouping, like.device), _spread(like.shape, values)


# like: a tensor of one value per row; values: [R] float32 each, spread: the same per row.
# A token's weight is 0 where the mask is, in rows after the last response, and where skip_zero
# says so. On a GPU lengths are not looked at before: whatever they are, offsets rise from 0 and
# end within the rows. A total that can't be one of the whole batch gives weights of NaN there.
token_weights = define(
    f"token_weights(Tensor like, {schema_of(Grouping)}, Tensor[] values, str backend)"
    f" -> ({schema_of(Responses)}, Tensor[] spread)",
    _launch,
    _fake,
)
