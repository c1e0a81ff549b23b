"""Sampling replay: log-probabilities over the ids that a token was sampled from, against the whole
row with -inf elsewhere."""

from __future__ import annotations

import pytest
import torch
from backends import CPU, GPU, SLOW, on_backends
from problems import OBJECTIVES, assert_matches, problem

import dcpo_kernels as dk

LENGTHS = (6, 0, 1, 9, 8)
on_every = on_backends("reference", CPU[0], *SLOW, *GPU)


def case(name="dcpo", layout="packed", **parts):
    """A problem, the ids that its tokens were sampled from, and the problem of the same rows with
    -inf elsewhere. Sets of any size; the target is anywhere in its own."""
    p = problem(OBJECTIVES[name](**parts), layout=layout, lengths=LENGTHS, temperature=0.7)
    rows, vocab = p.logits.shape[:-1], p.logits.shape[-1]
    order = torch.rand(*rows, vocab).argsort(-1)[..., :9]
    size = torch.randint(2, 10, rows)[..., None]
    kept = torch.where(torch.arange(9) < size, order, -1)
    target = p.arguments["target_ids"]
    has = (kept == target[..., None]).any(-1, keepdim=True)
    kept[..., :1] = torch.where(has, kept[..., :1], target[..., None])
    kept = torch.where(p.counts[..., None], kept, -1)  # what is there for padding has no effect
    inside = torch.zeros(*rows, vocab + 1, dtype=torch.bool)
    inside.scatter_(-1, torch.where(kept < 0, vocab, kept), True)
    keep = inside[..., :vocab] | ~p.counts[..., None]
    base = p.base.clone()
    p.view(base).copy_(torch.where(keep, p.logits, -torch.inf))
    narrowed = type(p)(base, p.view, p.arguments)
    return p, kept, narrowed


@on_every
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("layout", ["packed", "row-stride", "padded"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "sapo"])
def test_losses(use_backend, name, layout, inplace):
    p, kept, narrowed = case(name, layout, entropy_coef=0.05)
    expected = narrowed.oracle()
    found = p.run(lambda loss: 2 * loss, kept_ids=kept, inplace=inplace, backend=use_backend)
    assert_matches(narrowed, found, expected, scale=2.0)
    elsewhere = narrowed.logits == -torch.inf
    assert (found[1][elsewhere] == 0).all()


@on_every
def test_one_list_for_all_rows(use_backend):
    p, kept, _ = case()
    sizes = (kept >= 0).sum(-1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    flat = kept[kept >= 0].to(torch.int32)
    out, gradient = p.run(kept_ids=kept, backend=use_backend)
    same, same_gradient = p.run(kept_ids=flat, kept_offsets=offsets, backend=use_backend)
    torch.testing.assert_close(same.loss, out.loss)
    torch.testing.assert_close(same_gradient, gradient)


@on_every
def test_selected_logprobs(use_backend):
    p, kept, narrowed = case(layout="padded")
    leaf = p.logits.clone().requires_grad_()
    ids, mask = p.arguments["target_ids"], p.arguments["mask"]
    given = {"mask": mask, "temperature": 0.7, "with_entropy": True}
    logprobs, entropy = dk.selected_logprobs(leaf, ids, kept_ids=kept, backend=use_backend, **given)
    whole = narrowed.logits.double().requires_grad_()
    want, want_entropy = dk.selected_logprobs(whole, ids, backend="reference", **given)
    torch.testing.assert_close(logprobs.double(), want, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-6, atol=4e-6)
    upstream = torch.randn(2, *ids.shape)
    (gradient,) = torch.autograd.grad([logprobs, entropy], leaf, list(upstream))
    (wanted,) = torch.autograd.grad([want, want_entropy], whole, list(upstream.double()))
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5, atol=5e-6)


@on_backends("reference", CPU[0])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_target_outside(use_backend, layout, on_policy):
    """NaN, or no token at all."""
    p, kept, _ = case(layout=layout)
    if on_policy:
        p.arguments["old_logprobs"] = None
    target = p.arguments["target_ids"]
    lost = p.counts & (torch.rand(target.shape, generator=torch.Generator().manual_seed(4)) < 0.3)
    spoiled = torch.where(lost[..., None] & (kept == target[..., None]), -1, kept)
    out, gradient = p.run(kept_ids=spoiled, backend=use_backend)
    assert torch.equal(out.token_loss.isnan(), lost) and out.loss.isnan()
    assert torch.equal(gradient.isnan().any(-1), lost & (spoiled >= 0).any(-1))
    out, gradient = p.run(kept_ids=spoiled, drop_nonfinite=True, backend=use_backend)
    same, want = p.run(kept_ids=kept, mask=p.counts & ~lost, backend=use_backend)
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(gradient, want)
    assert dk.summarize(out)["tokens_dropped"] == lost.sum() > 0


def test_compiled_whole():
    p, kept, _ = case()
    given = {**p.arguments, "kept_ids": kept, "backend": "reference"}

    def run(logits):
        return dk.policy_loss(logits, **given).loss

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = p.logits.clone().requires_grad_()
        loss = call(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


MISTAKES = [
    ("kept_ids must be a tensor of int64", TypeError, {"kept_ids": torch.zeros(24, 3)}),
    (r"kept_ids must be \[24, 'S'\]", ValueError, {"kept_ids": torch.zeros(23, 3).long()}),
    (r"kept_ids must be \[24, 'S'\]", ValueError, {"kept_ids": torch.zeros(24, 0).long()}),
    ("outside the vocabulary of 37", IndexError, {"kept_ids": torch.full((24, 1), 37)}),
    ("has the id 5 more than once", ValueError, {"kept_ids": torch.full((24, 2), 5)}),
    (r"kept_ids must be \[M\]", ValueError, {"kept_offsets": torch.zeros(25).long()}),
    (
        "kept_offsets must rise from 0 to at most 2",
        ValueError,
        {"kept_ids": torch.tensor([1, 2]), "kept_offsets": torch.arange(25)},
    ),
    ("has 'topk_tv'", ValueError, {"objective": OBJECTIVES["dppo-topk_tv"]()}),
]


@pytest.mark.parametrize("words, error, changes", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes(words, error, changes):
    p, kept, _ = case()
    with pytest.raises(error, match=words):
        p.run(**{"kept_ids": kept, **changes}, backend="reference")
