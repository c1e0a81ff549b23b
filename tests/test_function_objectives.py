"""Losses that are a Python function: between our read and our write, on every backend."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from backends import CPU, EVERYWHERE, GPU, SLOW, on_backends
from problems import assert_matches, problem

import dcpo_kernels as dk

EXAMPLES = Path(__file__).parents[1] / "examples" / "token_losses.py"
spec = importlib.util.spec_from_file_location("token_losses", EXAMPLES)
assert spec is not None and spec.loader is not None
examples = importlib.util.module_from_spec(spec)
spec.loader.exec_module(examples)

LENGTHS = (6, 0, 1, 9, 8)


def dapo(t: dk.TokenValues) -> torch.Tensor:
    ratio = (t.logprobs - t.old_logprobs).exp()
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.28))


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("layout", ["packed", "padded", "sliced"])
def test_a_formula_written_again(use_backend, layout, inplace):
    p = problem(dk.dapo(), layout=layout, lengths=LENGTHS, temperature=0.7, advantages="response")
    expected, want = p.oracle()
    expected = expected._replace(clipped=torch.zeros_like(expected.clipped))
    found = p.run(
        lambda loss: 2 * loss, objective=dapo, max_length=None, inplace=inplace, backend=use_backend
    )
    out = found[0]._replace(loss=found[0].loss.detach())
    assert_matches(p, (out, found[1]), (expected, want), scale=2.0)
    assert dk.summarize(out)["tokens"] == sum(LENGTHS)


@on_backends("reference", CPU[0])
def test_entropy_carries_a_gradient(use_backend):
    """The same as the objective's own entropy term."""
    p = problem(dk.dapo(entropy_coef=0.1), lengths=LENGTHS)

    def loss(t):
        return dapo(t) - 0.1 * t.entropy

    expected, want = p.oracle()
    expected = expected._replace(clipped=torch.zeros_like(expected.clipped))
    out, gradient = p.run(objective=loss, max_length=None, with_entropy=True, backend=use_backend)
    assert_matches(p, (out._replace(loss=out.loss.detach()), gradient), (expected, want))


@on_backends("reference", CPU[0])
def test_aggregations_and_what_a_function_sees(use_backend):
    p = problem(dk.dr_grpo(), layout="padded", lengths=LENGTHS)
    seen = []

    def loss(t):
        seen.append(t)
        return dapo(t)

    objective = dk.Objective("mine", function=loss, aggregation="seq-mean-token-sum-norm")
    clipped = dk.dapo(aggregation="seq-mean-token-sum-norm")
    ref = torch.randn(p.logits.shape[:-1])
    out, gradient = p.run(objective=objective, ref_logprobs=ref, backend=use_backend)
    same, want = p.run(objective=clipped, backend=use_backend)
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(gradient, want)
    (t,) = seen
    for x in t[:3]:
        assert (x[~t.mask] == 0).all()
    assert torch.equal(t.lengths, torch.tensor(LENGTHS)) and torch.equal(t.mask, out.mask)
    assert torch.equal(t.response, torch.arange(5)[:, None].expand(t.mask.shape))
    assert torch.equal(t.ref_logprobs[t.mask], ref[t.mask]) and t.entropy is None


@on_backends("reference", CPU[0])
def test_compiled_whole(use_backend):
    p = problem(dk.dapo(), lengths=LENGTHS)
    given = {**p.arguments, "objective": dapo, "max_length": None, "backend": use_backend}

    def run(logits, given):
        return dk.policy_loss(logits, **given).loss

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = p.logits.clone().requires_grad_()
        loss = call(leaf, given)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_mistakes():
    p = problem(dk.dapo(), lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"one loss per token, shape \[24\], got \[\]"):
        p.run(objective=lambda t: t.logprobs.sum())
    with pytest.raises(TypeError, match=r"objective must be an Objective .* or a function"):
        p.run(objective="dapo")
    with pytest.raises(ValueError, match="a function is the whole loss of a token"):
        dk.Objective("mine", function=dapo, kl_coef=0.1)


# ---- the examples, against the packages that have them ------------------------------------------

BATCH, TIME = 4, 12


@pytest.fixture
def tokens():
    """Log-probabilities that carry a gradient, old ones, advantages, mask; float64."""
    new = (-2 * torch.rand(BATCH, TIME, dtype=torch.float64)).requires_grad_()
    old = (new.detach() + 0.4 * torch.randn(BATCH, TIME)).clamp(max=-1e-3)
    mask = torch.arange(TIME) < torch.tensor([12, 3, 7, 10])[:, None]
    return new, old, torch.randn(BATCH, 1, dtype=torch.float64).expand(BATCH, TIME), mask


def ours(function, tokens, **given):
    new, old, advantages, mask = tokens
    out = dk.policy_loss_from_logprobs(
        new, old, advantages, mask=mask, objective=function, backend="reference", **given
    )
    return out.loss, torch.autograd.grad(out.loss, new)[0]


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_covariance_losses_are_verls(tokens, name):
    config = pytest.importorskip("verl.workers.config", reason="verl is not installed")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    actor = config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    share = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}
    object.__setattr__(actor, "policy_loss", type("PolicyLoss", (), {**share, "clip_cov_ub": 5.0}))
    new, old, advantages, mask = tokens
    torch.manual_seed(3)  # which of the candidates verl leaves out is random
    loss, _ = algos.get_policy_loss_fn(name)(
        old, new, advantages, mask.double(), "token-mean", actor
    )
    want = torch.autograd.grad(loss, new)[0]
    torch.manual_seed(3)
    function = {
        "clip_cov": examples.clip_cov(share=0.2, low=0.1, high=5.0),
        "kl_cov": examples.kl_cov(share=0.2, coef=0.7),
    }[name]
    found, gradient = ours(function, tokens)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-7)
    plain = ours(examples.clipped, tokens)[1]
    assert not torch.allclose(gradient, plain)


def test_high_entropy_tokens_are_trls(tokens):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    alone = type("Accelerator", (), {"pad_across_processes": lambda s, x, **_: x})
    alone.gather = lambda self, x: x
    entropy = torch.rand(BATCH, TIME, dtype=torch.float64)
    mask = trainer.GRPOTrainer.get_high_entropy_mask(
        type("Trainer", (), {"accelerator": alone()})(), entropy, tokens[3], 0.8
    )
    found, gradient = ours(examples.high_entropy(share=0.2), tokens, entropy=entropy)
    new, old, advantages, counts = tokens
    ratio = (new - old).exp()
    each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = (each * mask).sum() / counts.sum()
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, new)[0], rtol=1e-6, atol=1e-7)
    assert 0 < mask.sum() < counts.sum() / 3


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("in_pass", [False, True])
def test_centered_scores_have_no_mean(in_pass, use_backend):
    """Over every token that the engine may have sampled, with its probability, the gradient of one
    advantage is 0; without the centre it is not. With a cap that nothing meets, p/q centers
    itself."""
    vocab, draw = 12, torch.Generator().manual_seed(5)
    x, engine = torch.randn(2, vocab, generator=draw, dtype=torch.float64)
    log_q = engine.log_softmax(-1)
    top = log_q.topk(vocab - 1)  # the rest is one token: nothing is lost in its bucket

    def mean_gradient(function, **given):
        leaf = x.float().expand(vocab, vocab).clone().requires_grad_()
        out = dk.policy_loss(
            leaf,
            torch.arange(vocab),
            log_q.float(),
            torch.ones(1),
            lengths=[vocab],
            weights=log_q.exp().float(),
            objective=function,
            backend=use_backend,
            **given,
        )
        return torch.autograd.grad(out.loss, leaf)[0].sum(0)

    given = {
        "topk_ids": top.indices.expand(vocab, -1),
        "topk_logprobs": top.values.float().expand(vocab, -1),
    }
    for cap in (1.2, 100.0):
        centre = dk.cispo(cap, score_centering=True) if in_pass else examples.score_centering(cap)
        centered = mean_gradient(centre, **given)
        assert centered.abs().max() < 1e-6
    plain = mean_gradient(dk.cispo(1.2))
    assert plain.abs().max() > 1e-2
    far = mean_gradient(dk.cispo(100.0))
    assert far.abs().max() < 1e-6


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_centre_in_the_pass_is_that_of_the_function(layout, use_backend):
    p = problem(dk.cispo(1.3, score_centering=True), lengths=LENGTHS, layout=layout)
    found, gradient = p.run(backend=use_backend)
    want, want_gradient = p.run(objective=examples.score_centering(1.3), backend=use_backend)
    close = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(found.token_loss, want.token_loss, **close)
    torch.testing.assert_close(found.loss.detach(), want.loss.detach(), **close)
    torch.testing.assert_close(gradient, want_gradient, **close)
    with pytest.raises(ValueError, match="score_centering=True needs topk_logprobs"):
        p.run(topk_logprobs=None, backend=use_backend)


def test_a_function_has_the_top_k_and_the_target():
    p = problem(dk.dapo(), lengths=LENGTHS)
    ids = torch.arange(4).expand(24, 4)
    given = {"topk_ids": ids, "topk_logprobs": -torch.ones(24, 4)}
    seen = []

    def loss(t):
        seen.append(t)
        return dapo(t) + t.topk_logprobs.sum(-1)

    p.run(objective=loss, **given, backend="reference")
    want = torch.log_softmax(p.logits, -1)[:, :4]
    torch.testing.assert_close(seen[0].topk_logprobs.detach(), want)
    assert torch.equal(seen[0].old_topk_logprobs, given["topk_logprobs"])
    with pytest.raises(ValueError, match="or both of them for a function"):
        p.run(objective=loss, topk_ids=ids)
    with pytest.raises(ValueError, match=r"K in 1\.\.127"):
        many = {key: x[:, :1].expand(24, 128) for key, x in given.items()}
        p.run(objective=loss, **many)


def by_token(tokens, loss_of):
    """The mean of a loss written token by token, loss_of(row, t, r, moved) of tensors [T]."""
    new, old, advantages, mask = tokens
    parts = []
    for b in range(BATCH):
        n = int(mask[b].sum())
        moved = (new - old)[b, :n]
        parts += [loss_of(b, t, float(advantages[b, 0]), moved) for t in range(n)]
    total = torch.stack(parts).sum() / mask.sum()
    return total.detach(), torch.autograd.grad(total, new)[0]


def test_m2po(tokens):
    new, old, advantages, mask = tokens
    moved = (new - old).detach()
    stoppable = [
        (float(moved[b, t] ** 2), b, t)
        for b, t in mask.nonzero().tolist()
        if advantages[b, t] * moved[b, t] > 0
    ]
    kept = sorted(stoppable)
    while sum(x for x, *_ in kept) > 0.04 * len(kept):
        kept.pop()  # the one that moved furthest
    dropped = {(b, t) for _, b, t in stoppable} - {(b, t) for _, b, t in kept}
    assert dropped and kept
    want = by_token(
        tokens, lambda b, t, A, x: -A * x[t].exp() * (0.0 if (b, t) in dropped else 1.0)
    )
    torch.testing.assert_close(ours(examples.m2po(0.04), tokens), want, rtol=1e-6, atol=1e-7)


def test_cppo(tokens):
    new, old, *_ = tokens
    stopped = []

    def loss(b, t, A, x):
        n = len(x)
        drift = (new[b, :n].exp() - old[b, :n].exp()).detach().abs()
        weight = 1 - 0.2 * torch.arange(n) / max(n - 1, 1)
        spent, allowed = (weight * drift)[:t].sum(), 0.02 * weight[:t].sum()
        far = weight[t] * drift[t] > min(0.05, 0.05 + allowed - spent)
        stopped.append(bool(far and A * (x[t].exp() - 1) > 0))
        return -A * x[t].exp() * (0.0 if stopped[-1] else 1.0)

    want = by_token(tokens, loss)
    assert 0 < sum(stopped) < len(stopped)
    found = ours(examples.cppo(limit=0.05), tokens)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_fipo(tokens):
    gamma = 0.5 ** (1 / 4)

    def loss(b, t, A, x):
        later = sum(gamma ** (k - t) * float(x[k].detach()) for k in range(t, len(x)))
        A = A * min(max(math.exp(later), 0.8), 1.2)
        r = x[t].exp()
        return torch.maximum(-A * r, -A * r.clamp(0.8, 1.2))

    found = ours(examples.fipo(half_life=4.0), tokens)
    want = by_token(tokens, loss)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7, check_dtype=False)
