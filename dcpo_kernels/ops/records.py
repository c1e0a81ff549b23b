"""What the operators take and return: each argument is named here and nowhere else.

The schemas are made from these records, and the launchers of every backend take them whole. N is
the number of rows, one per token; a tensor of one value per row has the shape of the logits without
their vocabulary, [N] or [B, T], and is contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What it takes to read a row."""

    target_ids: Tensor  # [N] int64
    temperatures: Tensor | None  # [N] float32; None: Options.temperature for all of them
    topk_ids: Tensor | None  # [N, K] int64
    topk_logprobs: Tensor | None  # [N, K] float32
    old_logits: Tensor | None  # of the logits' shape; its rows may be strided


class Tokens(NamedTuple):
    """What it takes to decide. [N] float32"""

    old_logprobs: Tensor | None  # None: those of the policy itself, the ratio is 1
    advantages: Tensor
    weights: Tensor  # 0: the row is not read, its results are 0 and its ratio 1
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    log_ratio: Tensor | None = None  # that the ratio is taken from; None: logp - old_logp
    rollout_logprobs: Tensor | None = None  # by the engine that sampled; None: rollout_mode is too
    entropy_weights: Tensor | None = None  # of the entropy term, times the weight; None: 1


class Options(NamedTuple):
    temperature: float
    with_entropy: bool
    softcap: float = 0.0  # x~ = softcap tanh(x / softcap) before the temperature; 0: x itself


class Results(NamedTuple):
    """What is said of every row. [N] float32, float64 for float64 logits."""

    token_loss: Tensor
    logprobs: Tensor
    entropy: Tensor  # [0] unless asked for
    ratio: Tensor
    clipped: Tensor  # int8


class Written(NamedTuple):
    """What is said of a row's gradient, written or not. [N]"""

    has_gradient: Tensor  # int8: 0 where nothing pulls at the row, and its gradient is all zeros


class Targets(NamedTuple):
    """Which rows are read, and for what."""

    target_ids: Tensor  # [N] or [N, K] int64
    mask: Tensor | None  # [N] bool or uint8; the results of other rows are 0; None: all are read
    temperatures: Tensor | None  # [N] float32; None: Options.temperature for all of them


class RowStats(NamedTuple):
    """lse = row_max / temperature + log_sum, in two parts: added up, a row shifted by 1e4 would
    lose four digits. Under a softcap they are of the capped logits. [N] float32, float64 for
    float64 logits."""

    logprobs: Tensor  # of the shape of target_ids
    entropy: Tensor  # [0] unless asked for
    row_max: Tensor
    log_sum: Tensor


class RowCoefficients(NamedTuple):
    """dx_j = factor/T [sum_k g_k (1[j = y_k] - p_j) - h p_j (log p_j + H)], with a softcap times
    dx~_j/dx_j. [N] float32, float64 for float64 logits. A row with g = h = 0 is not read, its
    gradient is 0."""

    target_ids: Tensor  # [N] or [N, K] int64; an id may come more than once
    temperatures: Tensor | None  # None: the number `temperature` for all of them
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None  # None where h is
    g: Tensor  # of the shape of target_ids
    h: Tensor | None  # None: no entropy term


class Grouping(NamedTuple):
    """Which rows form a response, and what its tokens weigh. R is the number of responses."""

    mask: Tensor | None  # [N] bool or uint8, nonzero where a token counts; None: all of them do
    lengths: Tensor | None  # [R] int64 rows of each response; None: T rows each of [B, T]
    aggregation: int  # place in objective.AGGREGATIONS
    num_responses: int | None  # of the whole batch; None: as counted here
    num_tokens: int | None
    max_length: int | None
    num_responses_on_device: Tensor | None  # scalar float32, in the place of the number
    num_tokens_on_device: Tensor | None
    max_length_on_device: Tensor | None
    skip_zero: Tensor | None  # [N] or [R] float32: where it is 0, the weight is
    skip_by_response: bool  # skip_zero is [R]
    skip_whole_responses: bool  # only where it is 0 for all tokens of the response that count
    response_lengths: Tensor | None = None  # [R] int64 of whole responses; None: all is here
    weights: Tensor | None = None  # [N] float32, in the place of the aggregation's


class Responses(NamedTuple):
    """What `token_weights` makes of it."""

    weights: Tensor  # [N] float32
    mask: Tensor  # [N] bool: the token counts
    offsets: Tensor  # [R + 1] int64: response i has the rows from offsets[i] to offsets[i + 1]
    lengths: Tensor  # [R] int64: tokens of each response that count, in other calls too


class Value(NamedTuple):
    values: Tensor  # [R] float32


class Read(NamedTuple):
    """What was read of every row. [N] float32 (or float64)."""

    logprobs: Tensor
    entropy: Tensor | None  # needed where the objective has an entropy term


class RatioGroups(NamedTuple):
    """Which rows have one ratio."""

    by_response: bool  # exp of the mean log-ratio over the response's tokens (GSPO), else per token
    spread: bool  # what pulls at that ratio pulls at all of these tokens alike; only by_response
    offsets: Tensor  # [R + 1] int64, as token_weights makes them
    lengths: Tensor  # [R] int64


class Decisions(NamedTuple):
    token_loss: Tensor  # [N]
    ratio: Tensor
    clipped: Tensor  # int8


class Coefficients(NamedTuple):
    """The derivative of a row's loss times its weight. [N] float32, float64 for float64 logits."""

    g: Tensor  # in the target's log-probability
    h: Tensor  # in the entropy; [0] where there is no entropy term


class Head(NamedTuple):
    """What makes the logits of hidden states: hidden @ weight.T + bias."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    float32_logits: bool  # of a 16-bit product too
    memory_limit: int  # bytes that the logits of a chunk may take


class Wanted(NamedTuple):
    """Which gradients a head is asked for."""

    of_hidden: bool
    of_weight: bool
    of_bias: bool


class HeadGradients(NamedTuple):
    """[0] for those that are not wanted."""

    hidden_gradient: Tensor  # of the dtype and shape of the hidden states
    weight_gradient: Tensor  # [V, D]
    bias_gradient: Tensor  # [V]


class Totals(NamedTuple):
    loss: Tensor  # scalar: the sum of weight times token_loss
    response_loss: Tensor  # [R] mean of token_loss over the response's tokens, 0 where it has none
    summary: Tensor  # [len(Summary._fields)]


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
}


def schema_of(*records: type) -> str:
    """The fields as a schema has them: "Tensor target_ids, Tensor? temperatures, ..."."""
    return ", ".join(
        f"{_SCHEMA_TYPES[hint]} {name}"
        for record in records
        for name, hint in get_type_hints(record).items()
    )


def unpack(values: tuple[Any, ...], *records: Any) -> list[Any]:
    """The flat arguments of an operator as its records, and a list of what comes after them."""
    parts, at = [], 0
    for record in records:
        count = len(record._fields)
        parts.append(record(*values[at : at + count]))
        at += count
    return [*parts, values[at:]]


def replaced(record: Any, **changes: Any) -> Any:
    """record._replace(**changes), which Dynamo does not know before torch 2.7."""
    cls = type(record)
    return cls(*[changes.get(name, x) for name, x in zip(cls._fields, record)])  # noqa: B905


def result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
