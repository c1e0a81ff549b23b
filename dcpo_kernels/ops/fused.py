"""fused, fused_: read, decide, write. Each row of logits is read once and its gradient written
once."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.objective import Numbers
from dcpo_kernels.ops.library import check_distinct, check_ids, check_places, check_tensors, define
from dcpo_kernels.ops.records import (
    Options,
    Results,
    Rows,
    Tokens,
    Written,
    result_dtype,
    schema_of,
    unpack,
)


def results_of(logits: Tensor, options: Options) -> tuple[Results, Written]:
    shape = logits.shape[:-1]
    token_loss = logits.new_empty(shape, dtype=result_dtype(logits))
    new = token_loss.new_empty
    results = Results(
        token_loss=token_loss,
        logprobs=new(shape),
        entropy=new(shape if options.with_entropy else 0),
        ratio=new(shape),
        clipped=new(shape, dtype=torch.int8),
    )
    return results, Written(new(shape, dtype=torch.int8))


def _gradient(logits: Tensor, with_gradient: bool) -> Tensor:
    """Contiguous, whatever the logits are."""
    return logits.new_empty(logits.shape if with_gradient else 0)


def check_rows(logits: Tensor, rows: Rows, tokens: Tokens) -> None:
    count = logits.shape[:-1].numel()
    k = 0 if rows.topk_ids is None else rows.topk_ids.shape[-1]
    if rows.old_logits is not None and rows.old_logits.shape != logits.shape:
        raise ValueError(f"old_logits {list(rows.old_logits.shape)}, logits {list(logits.shape)}")
    plain = rows._replace(old_logits=None)
    check_tensors(logits, plain, count, topk_ids=count * k, topk_logprobs=count * k)
    check_tensors(logits, tokens, count)
    check_ids("target_ids", rows.target_ids, logits, tokens.weights)
    if rows.topk_ids is not None:
        check_ids("topk_ids", rows.topk_ids, logits, tokens.weights)
        check_distinct("topk_ids", rows.topk_ids, tokens.weights)


def _run(
    logits: Tensor,
    gradient: Tensor | None,
    rows: Rows,
    tokens: Tokens,
    numbers: Numbers,
    options: Options,
    backend: str,
) -> list[Tensor]:
    check_rows(logits, rows, tokens)
    results, written = results_of(logits, options)
    if logits.numel():
        kernels = backends.kernels(backend)
        kernels.fused(logits, gradient, rows, tokens, numbers, options, results, written)
    return [*results, *written]


def _launch(logits, *flat):
    rows, tokens, numbers, options, (with_gradient, backend) = unpack(flat, *_RECORDS)
    gradient = _gradient(logits, with_gradient)
    written = gradient if with_gradient else None
    return *_run(logits, written, rows, tokens, numbers, options, backend), gradient


def _fake(logits, *flat):
    _, _, _, options, (with_gradient, _) = unpack(flat, *_RECORDS)
    results, written = results_of(logits, options)
    return *results, *written, _gradient(logits, with_gradient)


def _launch_in_place(logits, *flat):
    rows, tokens, numbers, options, (backend,) = unpack(flat, *_RECORDS)
    check_places(logits)
    return tuple(_run(logits, logits, rows, tokens, numbers, options, backend))


def _fake_in_place(logits, *flat):
    _, _, _, options, _ = unpack(flat, *_RECORDS)
    results, written = results_of(logits, options)
    return *results, *written


_RECORDS = (Rows, Tokens, Numbers, Options)
fused = define(
    f"fused(Tensor logits, {schema_of(*_RECORDS)}, bool with_gradient, str backend)"
    f" -> ({schema_of(Results, Written)}, Tensor gradient)",
    _launch,
    _fake,
)
fused_ = define(
    f"fused_(Tensor(a!) logits, {schema_of(*_RECORDS)}, str backend)"
    f" -> ({schema_of(Results, Written)})",
    _launch_in_place,
    _fake_in_place,
)
