"""What a loss from hidden states costs: rows in matrix products, and memory."""

from __future__ import annotations

import pytest
import torch
from backends import CPU, on_backends
from linear_cases import VOCAB, Case, on_cpu, rows
from problems import OBJECTIVES
from test_threads_and_memory import peak
from torch.profiler import ProfilerActivity, profile

import dcpo_kernels as dk


def products(run):
    """Rows that went through a product with the whole weight, or with its gradient."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    at = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # the first factor
    multiplied = 0
    for event in seen.events():
        if event.name in at:
            (n, k), (_, m) = event.input_shapes[at[event.name] :][:2]
            multiplied += n * k * m
    return multiplied / VOCAB**2


@on_cpu
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_rows_without_a_gradient_cost_no_product(name, use_backend):
    case = Case(OBJECTIVES[name](), lengths=(32, 32), bias=False)
    ones, half = torch.ones(64), torch.tensor([1.0, 0.0]).repeat_interleave(32)
    whole = {"old_logprobs": None, "memory_limit": rows(64), "advantages": ones}

    def cost(**options):
        return products(lambda: case.run(use_backend, **{**whole, **options}))

    assert cost() == 3 * 64
    assert cost(mask=torch.arange(64) % 2 == 0) == 3 * 32
    assert cost(advantages=half, skip_zero_advantage=True) == 3 * 32
    assert cost(advantages=half) == 64 + 2 * 32
    two = {"advantages": half[torch.randperm(64)], "memory_limit": rows(48)}
    if name == "dcpo":
        assert cost(**two) == 64 + 2 * 32
    assert cost(memory_limit=rows(48)) == (3 if name == "dcpo" else 4) * 64
    arguments = {**case.arguments, **whole}
    leaves = [x for x in case.leaves() if x is not None]
    with torch.no_grad():
        assert products(lambda: dk.linear_policy_loss(*leaves, **arguments)) == 64


@on_backends(CPU[0])
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_peak_memory_is_a_chunk_and_what_was_asked_for(name, dtype, parts, use_backend):
    tokens, width, vocab = 256, 256, 40_000  # far more than a block of the weight
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width) / 16
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (tokens,))
    chunk = tokens // parts * vocab * dtype.itemsize
    rest = {"lengths": [128, 128], "memory_limit": chunk, "backend": use_backend}
    rest |= {"objective": OBJECTIVES[name]()}
    kept = {}

    def run():
        out = dk.linear_policy_loss(hidden, weight, ids, None, torch.ones(2), **rest)
        kept["gradients"] = torch.autograd.grad(out.loss, (hidden, weight))

    sums = 4 * weight.numel() if dtype == torch.bfloat16 and parts > 2 else 0
    rule = chunk + sums + hidden.nbytes + weight.nbytes
    assert 0.9 * rule <= peak(run) <= 1.1 * rule


@on_cpu
def test_gradients_nobody_asks_for_cost_no_product(use_backend):
    case = Case(dk.dcpo(), lengths=(64,))
    base, weight, bias = case.leaves()
    arguments = {**case.arguments, "bias": bias.detach(), "backend": use_backend}
    arguments["old_logprobs"] = None  # then no row is clipped

    def run(hidden, weight):
        return lambda: dk.linear_policy_loss(hidden, weight, **arguments).loss.backward()

    assert products(run(base, weight.detach())) == 2 * 64  # a frozen head
    assert weight.grad is None
    assert products(run(base.detach(), weight)) == 2 * 64
