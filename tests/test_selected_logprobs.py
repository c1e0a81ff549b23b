"""selected_logprobs on every backend, against float64 autograd of plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import CPU, EVERYWHERE, GPU, device_of, on_backends
from numerics import NAN
from problems import DTYPES, LAYOUTS, ROUNDING, label, pairs, problem

import dcpo_kernels as dk
from dcpo_kernels.checks import MAX_K_READ
from dcpo_kernels.objective import MAX_K


def combine(logprobs, entropy, wants="both"):
    """A loss whose upstream gradients differ from token to token; None of it from one of the two
    where the other one alone is wanted."""
    draw = torch.Generator().manual_seed(3)
    c = torch.randn(logprobs.shape, generator=draw).to(logprobs)
    d = None if entropy is None else torch.randn(entropy.shape, generator=draw).to(entropy)
    return {
        "no entropy": lambda: (c * logprobs).sum(),
        "logprobs": lambda: (c * logprobs).sum(),
        "entropy": lambda: (d * entropy).sum(),
        "both": lambda: (c * logprobs).sum() + (d * entropy).sum(),
        "expanded": lambda: 0.3 * logprobs.sum() - 0.1 * entropy.sum(),  # gradients of stride 0
        "product": lambda: (
            logprobs * entropy.view(*entropy.shape, *[1] * (logprobs.dim() - entropy.dim()))
        ).mean(),
    }[wants]()


def several(p, k):
    """The problem with k targets a token: the sampled one, others, and the sampled one again."""
    ids = p.arguments["target_ids"]
    others = torch.randint(p.logits.shape[-1], (*ids.shape, k))
    others[..., [0, -1]] = ids[..., None]  # -100 where no token counts
    p.arguments["target_ids"] = others
    return p


CASES = pairs(
    layout=LAYOUTS,
    wants=("no entropy", "logprobs", "entropy", "both", "expanded", "product"),
    dtype=DTYPES,
    temperature=(1.0, 0.6, "token"),
    vocab=(5, 37, 1003, 4096, 40001),
    k=(None, 1, 2, 7),
)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_selected_logprobs(case, use_backend):
    wants, dtype, k = case["wants"], case["dtype"], case["k"]
    p = problem(dk.dcpo(), **{key: case[key] for key in case if key not in ("wants", "k")})
    p = p if k is None else several(p, k)
    upstream = partial(combine, wants=wants)
    found = p.selected(upstream, use_backend, with_entropy=wants != "no entropy")
    # The oracle differentiates plain PyTorch on the tokens that count.
    rows = p.logits[p.counts].double().requires_grad_()
    temperature = p.arguments["temperature"]
    if torch.is_tensor(temperature):
        temperature = temperature[p.counts][:, None].double()
    log_p = torch.log_softmax(rows / temperature, -1)
    ids = p.arguments["target_ids"]
    logprobs, entropy = (torch.zeros(s, dtype=torch.float64) for s in (ids.shape, p.counts.shape))
    at = ids[p.counts].view(len(rows), -1)
    logprobs = logprobs.index_put(
        (p.counts,), log_p.gather(1, at).view(len(rows), *ids.shape[p.counts.dim() :])
    )
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
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_logprobs_in_place(layout, dtype, k, use_backend):
    p = problem(dk.dcpo(), layout=layout, dtype=dtype)
    p = p if k is None else several(p, k)
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


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("layout", ["packed", "row-stride"])
def test_several_targets_in_place(layout, use_backend):
    """Their logits are fetched before any block or tile overwrites them."""
    p = problem(dk.dcpo(), layout=layout, dtype=torch.bfloat16, vocab=40001, lengths=(2, 1))
    run = partial(several(p, 5).selected, combine, use_backend, with_entropy=True)
    for one, two in zip(run(), run(inplace=True), strict=True):
        assert torch.equal(one, two)


@on_backends(*EVERYWHERE)
def test_one_target_of_several_is_the_same_bits(use_backend):
    for layout in ("packed", "padded"):
        p = problem(dk.dcpo(), layout=layout, dtype=torch.bfloat16)
        one = p.selected(combine, use_backend, with_entropy=True)
        p.arguments["target_ids"] = p.arguments["target_ids"][..., None]
        listed = p.selected(combine_first, use_backend, with_entropy=True)
        assert torch.equal(one[0], listed[0][..., 0])
        assert torch.equal(one[1], listed[1]) and torch.equal(one[2], listed[2])


def combine_first(logprobs, entropy):
    return combine(logprobs[..., 0], entropy)


@on_backends(*EVERYWHERE)
def test_most_targets(use_backend):
    """128 with a gradient, 1,024 without, and what they are wrong by near a probability of 1."""
    logits = 2 * torch.randn(2, 5003)
    logits[1, 17] = 40
    ids = torch.randint(5003, (2, MAX_K_READ))
    ids[:, [3, 100, 300]] = 17
    log_p = torch.log_softmax(logits.double(), -1)
    with torch.no_grad():
        logprobs = selected(logits, ids, use_backend)
    torch.testing.assert_close(logprobs.double(), log_p.gather(1, ids), rtol=2e-6, atol=3e-6)

    leaf, at, g = logits.clone().requires_grad_(), ids[:, :MAX_K], torch.randn(2, MAX_K)
    (gradient,) = torch.autograd.grad(selected(leaf, at, use_backend), leaf, g)
    g = g.double()
    own = torch.zeros_like(log_p).scatter_add_(1, at, g)
    expected = -own * log_p.expm1() - log_p.exp() * (g.sum(-1, keepdim=True) - own)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def selected(logits, ids, backend, **options):
    """On the backend's device and back."""
    device = device_of(backend)
    options |= {"backend": backend}
    return dk.selected_logprobs(logits.to(device), ids.to(device), **options)[0].cpu()


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_whose_gradients_cancel(dtype, use_backend):
    """Nothing is left for the row's other entries, but it does not count as a row without any."""
    logits = (2 * torch.randn(4, 37)).to(dtype)
    logits[2, 5], ids = NAN, torch.tensor([[1, 2]] * 3 + [[3, 3]])
    leaf = logits.clone().requires_grad_()
    g = torch.tensor([[1.5, -1.5], [0, 0], [1.5, -1.5], [1.5, -1.5]])
    (gradient,) = torch.autograd.grad(selected(leaf, ids, use_backend), leaf, g)
    expected = torch.zeros(37)
    expected[[1, 2]] = torch.tensor([1.5, -1.5])
    assert torch.equal(gradient[0].float(), expected)
    assert (gradient[[1, 3]] == 0).all() and gradient[2].isnan().all()


@on_backends("cuda emulated", "triton interpreted", *GPU)
@pytest.mark.parametrize("bad", [-1, 37, 2**40])
def test_a_target_outside_the_vocabulary(bad, use_backend, unchecked_ids):
    logits = 2 * torch.randn(3, 37)
    ids = torch.arange(15).view(3, 5)
    want = selected(logits, ids, use_backend)
    for k in range(5):
        wrong, leaf = ids.clone(), logits.clone().requires_grad_()
        wrong[1, k] = bad
        found = selected(leaf, wrong, use_backend)
        assert found[1, k].isnan()
        assert torch.equal(found[wrong == ids], want[wrong == ids])
        (gradient,) = torch.autograd.grad(found, leaf, torch.ones(3, 5))
        assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()
        masked = selected(
            leaf, wrong, use_backend, mask=torch.tensor([1, 0, 1]).to(device_of(use_backend))
        )
        (gradient,) = torch.autograd.grad(masked, leaf, torch.ones(3, 5))
        assert (masked[1] == 0).all() and (gradient[1] == 0).all() and gradient.isfinite().all()


@on_backends()
def test_too_many_targets(use_backend):
    logits, ids = torch.randn(2, 5, requires_grad=True), torch.zeros(2, MAX_K_READ + 1).long()
    with torch.no_grad():
        selected(logits, ids[:, 1:], use_backend)
        words = r"target_ids must .* \[2\], or K in 1..1024 \(without a gradient\), .* \[2, 1025\]"
        with pytest.raises(ValueError, match=words):
            selected(logits, ids, use_backend)
    for wrong in (ids[:, : MAX_K + 1], ids[:, :0], ids[:1, :3]):
        with pytest.raises(ValueError, match=r"K in 1..128 \(with a gradient\)"):
            selected(logits, wrong, use_backend)
    ids[1, 2] = 5
    with pytest.raises(IndexError, match=r"target_ids\[1, 2\] is 5, outside the vocabulary of 5"):
        selected(logits, ids[:, :3], use_backend)
    leaf = torch.zeros(0, 5, requires_grad=True)
    found = selected(leaf, torch.zeros(0, 3).long(), use_backend)
    found.sum().backward()
    assert found.shape == (0, 3) and leaf.grad.shape == (0, 5)
