"""finish: from tokens to the loss, the mean of each response, and the numbers a run is watched
by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.metrics import Summary
from dcpo_kernels.ops.library import check_tensors, define
from dcpo_kernels.ops.records import Responses, Results, schema_of, unpack


class Totals(NamedTuple):
    loss: Tensor  # scalar: the sum of weight times token_loss
    response_loss: Tensor  # [R] mean of token_loss over the response's tokens, 0 where it has none
    summary: Tensor  # [len(Summary._fields)]


def _totals(results: Results, responses: Responses) -> Totals:
    new = results.token_loss.new_empty
    return Totals(new(()), new(responses.lengths.shape), new((len(Summary._fields),)))


def _launch(*flat):
    results, responses, (backend,) = unpack(flat, Results, Responses)
    rows, count = results.token_loss.numel(), responses.lengths.numel()
    check_tensors(results.token_loss, results, rows, entropy=results.entropy.numel())
    check_tensors(results.token_loss, responses, rows, offsets=count + 1, lengths=count)
    totals = _totals(results, responses)
    backends.kernels(backend).finish(results, responses, totals)
    return tuple(totals)


def _fake(*flat):
    results, responses, _ = unpack(flat, Results, Responses)
    return tuple(_totals(results, responses))


finish = define(
    f"finish({schema_of(Results, Responses)}, str backend) -> ({schema_of(Totals)})", _launch, _fake
)
