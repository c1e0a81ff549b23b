"""Logits under a softcap (Gemma 2's final_logit_softcapping): x~ = c tanh(x / c), in the read and
in the write."""

from __future__ import annotations

import pytest
import torch
from backends import EVERYWHERE, GPU, KERNELS, on_backends
from numerics import INF, NAN
from problems import DTYPES, OBJECTIVES, assert_matches, problem

import dcpo_kernels as dk

everywhere = on_backends(*EVERYWHERE)
on_softcaps = pytest.mark.parametrize("softcap", [30.0, 2.0])
# One pass, one with an entropy term, two passes, listed tokens, a whole row of old logits.
NAMES = ["dcpo", "grpo", "gspo", "cispo-centered", "penalty-topk_kl", "dppo-kl", "penalty-tv"]


def capped(x, softcap):
    return torch.where(x == -INF, x, softcap * torch.tanh(x / softcap))


def case(name, softcap, dtype=torch.float32, spread=20.0, lengths=(6, 0, 1, 9), **options):
    """A problem whose old policy lies in the neighbourhood of the capped one, and some -inf."""
    p = problem(OBJECTIVES[name](**options), dtype=dtype, vocab=67, lengths=lengths)
    a, rows, T = p.arguments, len(p.base), 0.7
    ids = a["target_ids"]
    base = torch.where(torch.rand(rows, 67) < 0.7, 1.0, spread) * p.base.float()
    gone = (torch.rand(rows, 67) < 0.2) & ~torch.nn.functional.one_hot(ids, 67).bool()
    p.base = base.masked_fill(gone, -INF).to(dtype)
    old_logits = (p.base + 0.3 * torch.randn(rows, 67)).to(dtype)
    old = torch.log_softmax(capped(old_logits.double(), softcap) / T, -1)
    a |= {"temperature": T, "logit_softcap": softcap}
    a["old_logprobs"] = old.gather(1, ids[:, None])[:, 0].float()
    if "ref_logprobs" in a:
        a["ref_logprobs"] = a["old_logprobs"] + 0.3
    if "old_logits" in a:
        a["old_logits"] = old_logits
    if "topk_ids" in a:
        top = old.topk(5)
        a |= {"topk_ids": top.indices, "topk_logprobs": top.values.float()}
    return p


@on_softcaps
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_loss_of_capped_logits(name, softcap):
    """Autograd through tanh, in float64."""
    p = case(name, softcap, entropy_coef=0.1)
    out, gradient = p.oracle()
    a = {**p.arguments, "logit_softcap": None, "backend": "reference"}
    if "old_logits" in a:
        a["old_logits"] = capped(a["old_logits"].double(), softcap)
    leaf = p.base.double().requires_grad_()
    want = dk.policy_loss(capped(leaf, softcap), **a)
    (want_gradient,) = torch.autograd.grad(want.loss, leaf)
    torch.testing.assert_close(out.token_loss, want.token_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient.nan_to_num(), rtol=1e-9, atol=1e-12)
    assert (gradient[p.base == -INF] == 0).all() and (gradient != 0).any()


@everywhere
@on_softcaps
@pytest.mark.parametrize("name", NAMES)
def test_losses(name, softcap, use_backend):
    entropy = {"entropy_coef": 0.1} if name in ("grpo", "gspo", "penalty-tv") else {}
    spread = 1.0 if name == "cispo-centered" else 20.0  # a peaked row's alpha is rounding
    for dtype in DTYPES:
        p = case(name, softcap, dtype, spread, **entropy)
        found = p.run(backend=use_backend, inplace=dtype == torch.bfloat16)
        assert_matches(p, found, p.oracle())
        assert (found[1][p.base == -INF] == 0).all()


@everywhere
@on_softcaps
def test_logits_far_beyond_it(softcap, use_backend):
    """Up to 1e4, next to small ones: nothing overflows, and those of one sign are one."""
    for dtype in DTYPES:
        p = case("dcpo", softcap, dtype, spread=4e3, entropy_coef=0.1)
        assert_matches(p, p.run(backend=use_backend), p.oracle())


@everywhere
def test_a_gradient_of_what_is_saturated(use_backend):
    """1 - tanh^2, of which float32 has no digits left at 1: every entry is right to its own size.
    And logits far below the softcap are themselves."""
    for softcap, spread in ((2.0, 10.0), (1e6, 3.0)):
        logits = spread * torch.randn(4, 67)
        ids, upstream = torch.tensor([0, 7, 66, 30]), torch.tensor([1.0, -2.0, 0.5, 3.0])
        found = []
        for backend, x in ((use_backend, logits), ("reference", logits.double())):
            leaf = x.clone().requires_grad_()
            options = {"logit_softcap": softcap, "temperature": 0.5, "backend": backend}
            logprobs, _ = dk.selected_logprobs(leaf, ids, **options)
            found += [logprobs.detach(), *torch.autograd.grad(logprobs, leaf, upstream)]
        torch.testing.assert_close(found[0].double(), found[2], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(found[1].double(), found[3], rtol=2e-5, atol=1e-35)


@on_backends(*KERNELS, *GPU)
def test_a_dominant_token(use_backend):
    """Its logit and the row's maximum are capped to the same bits, or the digits beside 1 are
    lost."""
    logits = torch.full((40, 67), -20.0)
    ids = torch.arange(40)
    logits[ids, ids] = torch.linspace(10, 40, 40)
    options = {"logit_softcap": 30.0, "temperature": 2.0}
    logprobs, _ = dk.selected_logprobs(logits, ids, backend=use_backend, **options)
    want, _ = dk.selected_logprobs(logits.double(), ids, backend="reference", **options)
    assert (want < -1e-9).all() and (want > -1e-4).all()
    torch.testing.assert_close(logprobs.double(), want, rtol=0.1, atol=0)


@everywhere
def test_selected_logprobs(use_backend):
    """K ids per row with an entropy, in place, a temperature per token, and kept ids."""
    p = problem(dk.dcpo(), lengths=(5,))
    temperature = 0.5 + torch.rand(5)
    ids = torch.randint(37, (5, 4))
    kept = torch.rand(5, 37).argsort(-1)[:, :9]
    kept[2:, 6:] = -1
    for options in ({}, {"kept_ids": kept, "target_ids": kept[:, 1]}, {"inplace": True}):
        given = {"target_ids": ids, "temperature": temperature, **options}
        results = []
        for backend, dtype in ((use_backend, torch.float32), ("reference", torch.float64)):
            leaf = (10 * p.base).to(dtype).requires_grad_()
            logprobs, entropy = dk.selected_logprobs(
                leaf * 1, **given, with_entropy=True, logit_softcap=5.0, backend=backend
            )
            assert entropy is not None
            pulled = (logprobs * logprobs.detach()).sum() - 3 * entropy.sum()
            results.append([logprobs, entropy, *torch.autograd.grad(pulled, leaf)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


@everywhere
def test_a_function_and_kept_ids(use_backend):
    def token_loss(t):
        return -t.advantages * (t.logprobs - t.old_logprobs).exp()

    p = case("dcpo", 5.0)
    p.arguments["objective"] = dk.Objective("mine", function=token_loss)
    unbounded = dk.Objective("ratio", eps_low=1.0, eps_high=INF, aggregation="token-mean")
    found, want = p.run(backend=use_backend), p.oracle(objective=unbounded)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-6)
    p.arguments["objective"] = unbounded
    kept = p.base.masked_fill(
        torch.nn.functional.one_hot(p.arguments["target_ids"], 67).bool(), INF
    ).argsort(-1, descending=True)[:, :20]
    whole = torch.full_like(p.base, -INF).scatter(1, kept, p.base.gather(1, kept))
    found = p.run(backend=use_backend, kept_ids=kept)
    p.base = whole
    assert_matches(p, found, p.oracle())


@everywhere
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan", "inf"])
def test_a_poisoned_logit_makes_its_row_nan(poison, use_backend):
    for dtype in DTYPES:
        p = case("dppo-tv", 30.0, dtype, lengths=(3,))
        p.base[1, 5] = poison
        p.arguments["advantages"][0] = 0.0
        out, gradient = p.run(backend=use_backend)
        assert out.token_loss.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()
        assert (gradient[0] == 0).all()
