"""finish: from tokens to the loss, the mean of each response, and the numbers a run is watched
by."""

from __future__ import annotations

from dcpo_kernels import backends
from dcpo_kernels.metrics import Summary
from dcpo_kernels.ops.library import check_tensors, define
from dcpo_kernels.ops.records import Responses, Results, Totals, schema_of, unpack


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
