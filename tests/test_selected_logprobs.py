"""selected_logprobs on every backend, against float64 autograd of plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import CPU, EVERYWHERE, on_backends
from problems import DTYPES, LAYOUTS, ROUNDING, label, pairs, problem

import dcpo_kernels as dk


def combine(logprobs, entropy, wants="both"):
    """A loss whose upstream gradients differ from token to token; None of it from one of the two
    where the other one alone is wanted."""
    c, d = torch.randn(2, *logprobs.shape, generator=torch.Generator().manual_seed(3)).to(logprobs)
    return {
        "no entropy": lambda: (c * logprobs).sum(),
        "logprobs": lambda: (c * logprobs).sum(),
        "entropy": lambda: (d * entropy).sum(),
        "both": lambda: (c * logprobs).sum() + (d * entropy).sum(),
        "expanded": lambda: 0.3 * logprobs.sum() - 0.1 * entropy.sum(),  # gradients of stride 0
        "product": lambda: (logprobs * entropy).mean(),
    }[wants]()


CASES = pairs(
    layout=LAYOUTS,
    wants=("no entropy", "logprobs", "entropy", "both", "expanded", "product"),
    dtype=DTYPES,
    temperature=(1.0, 0.6, "token"),
    vocab=(5, 37, 1003, 4096, 40001),
)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_selected_logprobs(case, use_backend):
    wants, dtype = case["wants"], case["dtype"]
    p = problem(dk.dcpo(), **{key: value for key, value in case.items() if key != "wants"})
    upstream = partial(combine, wants=wants)
    found = p.selected(upstream, use_backend, with_entropy=wants != "no entropy")
    # The oracle differentiates plain PyTorch on the tokens that count.
    rows = p.logits[p.counts].double().requires_grad_()
    temperature = p.arguments["temperature"]
    if torch.is_tensor(temperature):
        temperature = temperature[p.counts][:, None].double()
    log_p = torch.log_softmax(rows / temperature, -1)
    logprobs, entropy = torch.zeros(2, *p.counts.shape, dtype=torch.float64)
    ids = p.arguments["target_ids"][p.counts][:, None]
    logprobs = logprobs.masked_scatter(p.counts, log_p.gather(1, ids))
    entropy = entropy.masked_scatter(p.counts, -(log_p.exp() * log_p).sum(-1))
    (expected,) = torch.autograd.grad(upstream(logprobs, entropy), rows)
    torch.testing.assert_close(found[0].double(), logprobs.detach(), rtol=2e-6, atol=3e-6)
    assert (found[1] is None) == (wants == "no entropy")
    if found[1] is not None:
        torch.testing.assert_close(found[1].double(), entropy.detach(), rtol=2e-6, atol=4e-6)
    assert (found[2][~p.counts] == 0).all()
    error = (found[2][p.counts].double() - expected).abs()
    assert (error <= ROUNDING[dtype] * expected.abs() + 3e-5).all()


@on_backends(*CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_logprobs_in_place(layout, dtype, use_backend):
    p = problem(dk.dcpo(), layout=layout, dtype=dtype)
    run = partial(p.selected, combine, use_backend, with_entropy=True)
    for one, two in zip(run(), run(inplace=True), strict=True):
        assert torch.equal(one, two)

    logits = p.base.clone().requires_grad_().clone()
    ids, mask = p.arguments["target_ids"], p.arguments.get("mask")
    logprobs, _ = dk.selected_logprobs(
        p.view(logits), ids, mask=mask, inplace=True, backend=use_backend
    )
    before = logits._version
    logprobs.sum().backward(retain_graph=True)
    assert logits._version > before
    with pytest.raises(RuntimeError, match="second time through one selected_logprobs"):
        logprobs.sum().backward()


@on_backends()
def test_selected_logprobs_without_entropy_or_grad(use_backend):
    p = problem(dk.dcpo(), layout="padded")
    logprobs, entropy, _ = p.selected(lambda x, _: x.sum(), use_backend)
    assert entropy is None
    arguments = (p.base, p.arguments["target_ids"].int())
    evaluated, _ = dk.selected_logprobs(
        *arguments, mask=p.counts.float(), temperature=1.0, backend=use_backend
    )
    assert not evaluated.requires_grad and torch.equal(evaluated, logprobs)
    assert (evaluated[~p.counts] == 0).all()


@on_backends()
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_selected_logprobs_of_nothing(shape, use_backend):
    leaf = torch.zeros(shape, requires_grad=True)
    logprobs, entropy = dk.selected_logprobs(
        leaf, torch.zeros(shape[:-1]).long(), with_entropy=True, backend=use_backend
    )
    assert logprobs.shape == entropy.shape == shape[:-1]
    (logprobs.sum() + entropy.sum()).backward()
    assert leaf.grad.shape == shape
