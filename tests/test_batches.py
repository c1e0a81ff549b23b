"""Batches as trainers have them: packed with a mask, cut into parts, weighted, from
log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import CPU, GPU, SLOW, on_backends
from problems import OBJECTIVES, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels.objective import AGGREGATIONS

LENGTHS = (6, 0, 1, 9, 8)
TOKENS = sum(LENGTHS)
# A few of those that take their own way through the operators.
SOME = ("dcpo", "gspo", "cispo", "penalty-topk_kl")


def rows(p, keep, **arguments):
    """The problem's per-token arguments where keep is true, and others in the place of its own."""
    there = {
        key: x[keep] if torch.is_tensor(x) and len(x) == TOKENS else x
        for key, x in p.arguments.items()
    }
    return {**there, **arguments}


def run(logits, **arguments):
    leaf = logits.detach().clone().requires_grad_()
    out = dk.policy_loss(leaf, **arguments)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def lengths_of(keep):
    return torch.stack([part.sum() for part in keep.split(LENGTHS)])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("leading", [False, True], ids=["N", "1xN"])
@pytest.mark.parametrize("name", SOME)
def test_packed_rows_with_a_mask(use_backend, name, leading):
    """What the mask leaves out may as well not be there: prompts, tools, padding."""
    p = problem(OBJECTIVES[name](), lengths=LENGTHS)
    keep = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    expected, want = run(
        p.logits[keep], **rows(p, keep, lengths=lengths_of(keep)), backend=use_backend
    )
    spoiled = {
        key: torch.where(
            keep.view(-1, *[1] * (x.dim() - 1)), x, torch.nan if x.is_floating_point() else -100
        )
        for key, x in p.arguments.items()
        if torch.is_tensor(x) and len(x) == TOKENS
    }
    logits = torch.where(keep[:, None], p.logits, torch.nan)
    given = {**p.arguments, **spoiled, "mask": keep, "lengths": torch.tensor(LENGTHS)}
    if leading:
        logits = logits[None]
        given |= {key: given[key][None] for key in (*spoiled, "mask")}
    out, gradient = run(logits, **given, backend=use_backend)
    assert out.mask.shape == logits.shape[:-1] and torch.equal(out.mask.view(-1), keep)
    close(out.loss, expected.loss)
    close(out.response_loss, expected.response_loss)
    close(gradient.view(TOKENS, -1)[keep], want)
    assert (gradient.view(TOKENS, -1)[~keep] == 0).all()
    assert dk.summarize(out)["tokens"] == keep.sum()


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_responses_cut_into_parts(use_backend, aggregation, name):
    """Parts of every response in several calls add up to the one call."""
    p = problem(OBJECTIVES[name](aggregation=aggregation), lengths=LENGTHS, advantages="response")
    whole, want = run(p.logits, **p.arguments, backend=use_backend)
    given, lengths = {}, torch.tensor(LENGTHS)
    if name == "gspo":
        moved = (whole.logprobs - p.arguments["old_logprobs"]).split(LENGTHS)
        given["response_log_ratio"] = torch.stack([x.sum() / max(len(x), 1) for x in moved])
    which = torch.arange(TOKENS) % 3  # parts like those of zigzag context parallelism
    loss, responses, gradient = 0.0, 0.0, torch.zeros_like(want)
    for part in range(3):
        here = which == part
        arguments = rows(p, here, lengths=lengths_of(here), response_lengths=lengths, **given)
        out, gradient[here] = run(p.logits[here], **arguments, backend=use_backend)
        loss, responses = loss + out.loss.detach(), responses + out.response_loss
    close(loss, whole.loss.detach())
    close(responses, whole.response_loss)
    close(gradient, want)


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", SOME)
def test_weights_of_ones_own(use_backend, name, layout):
    """They take the place of the aggregation, also of one that would want max_length."""
    # With ratio_level="sequence" a token's weight pulls at its whole response.
    level = {"ratio_level": "sequence-token"} if name == "gspo" else {}
    objective = OBJECTIVES[name](aggregation="token-sum", **level)
    p = problem(objective, lengths=LENGTHS, layout=layout)
    sums, want = p.run(backend=use_backend)
    weights = torch.rand(p.logits.shape[:-1]) * (torch.rand(p.logits.shape[:-1]) > 0.3)
    weights = weights + (sum(LENGTHS) > 0) * 0.1 if name == "gspo" else weights
    objective = replace(objective, aggregation="seq-mean-token-sum-norm")
    out, gradient = p.run(
        weights=weights, objective=objective, max_length=None, backend=use_backend
    )
    close(out.loss.detach(), (weights * sums.token_loss).sum())
    expected = weights[..., None] * want
    torch.testing.assert_close(gradient, expected.masked_fill(weights[..., None] == 0, 0.0))
    assert torch.equal(out.mask, sums.mask)


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_entropy_weights(use_backend, name):
    """The entropy term has weights of its own, whatever the aggregation is."""
    p = problem(OBJECTIVES[name](), lengths=LENGTHS)
    plain, want = p.oracle()
    own = torch.rand(TOKENS)
    objective = OBJECTIVES[name](entropy_coef=0.3)
    out, gradient = p.run(objective=objective, entropy_weights=own, backend=use_backend)
    leaf = p.logits.double().requires_grad_()
    ids = p.arguments["target_ids"]
    _, entropy = dk.selected_logprobs(leaf, ids, with_entropy=True, backend="reference")
    term = -0.3 * (own * entropy).sum()
    want = want + torch.autograd.grad(term, leaf)[0]
    close(out.loss.detach().double(), (plain.loss + term).detach())
    torch.testing.assert_close(gradient.double(), want, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match="entropy_weights are for the entropy term"):
        p.run(entropy_weights=own, backend=use_backend)


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "vespo", "penalty-topk_kl"])
def test_another_engine_sampled(use_backend, name, mode, on_policy):
    """In the pass, what rollout_weights makes of log-probabilities that are there before it."""
    p = problem(OBJECTIVES[name](), layout="padded", lengths=LENGTHS, importance="token")
    mask, old = p.arguments["mask"], p.arguments["old_logprobs"]
    rollout = old + 0.5 * torch.randn(old.shape)
    if on_policy:
        p.arguments["old_logprobs"] = None
        old = p.oracle()[0].logprobs.float()
    weights = dk.rollout_weights(old, rollout, mask=mask, mode=mode, low=0.7, high=1.4)
    assert (weights[mask] == (0.7 if mode == "truncate" else 0.0)).any()
    together = p.arguments["importance_weights"] * weights
    expected, want = p.run(importance_weights=together, backend=use_backend)
    given = {"rollout_mode": mode, "rollout_low": 0.7, "rollout_high": 1.4}
    objective = OBJECTIVES[name](**given)
    out, gradient = p.run(objective=objective, rollout_logprobs=rollout, backend=use_backend)
    close(out.loss.detach(), expected.loss.detach())
    torch.testing.assert_close(gradient, want, rtol=2e-5, atol=2e-6)
    rollout[mask & (torch.rand(mask.shape) < 0.2)] = torch.nan
    some, _ = p.run(
        objective=objective, rollout_logprobs=rollout, drop_nonfinite=True, backend=use_backend
    )
    assert torch.equal(some.mask, mask & rollout.isfinite())
    with pytest.raises(ValueError, match="needs rollout_logprobs"):
        p.run(objective=objective, backend=use_backend)
    with pytest.raises(ValueError, match="no use for rollout_logprobs"):
        p.run(rollout_logprobs=rollout, backend=use_backend)


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_tokens_that_are_not_finite(use_backend, layout):
    p = problem(dk.dcpo(), lengths=LENGTHS, layout=layout)
    old = p.arguments["old_logprobs"].clone()
    bad = torch.rand(old.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    old[bad] = torch.tensor([torch.nan, -torch.inf, torch.inf])[torch.arange(bad.sum()) % 3]
    out, gradient = p.run(old_logprobs=old, drop_nonfinite=True, backend=use_backend)
    expected, want = p.run(mask=p.counts & ~bad, backend=use_backend)
    assert torch.equal(out.loss, expected.loss) and torch.equal(gradient, want)
    assert torch.equal(out.mask, p.counts & ~bad)
    numbers = dk.summarize(out)
    assert numbers["tokens_dropped"] == (bad & p.counts).sum() > 0
    assert dk.summarize(expected)["tokens_dropped"] == 0
    assert not torch.isfinite(p.run(old_logprobs=old, backend=use_backend)[0].loss)


FROM_LOGPROBS = [name for name in OBJECTIVES if not OBJECTIVES[name]().needs_topk]
FROM_LOGPROBS = [name for name in FROM_LOGPROBS if not OBJECTIVES[name]().needs_old_logits]


@on_backends("reference", CPU[0], *SLOW, *GPU)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", FROM_LOGPROBS)
def test_from_logprobs(use_backend, name, layout):
    """From log-probabilities and an entropy that carry a gradient, the same as from logits."""
    objective = OBJECTIVES[name](entropy_coef=0.05, kl_coef=0.1)
    p = problem(objective, layout=layout, lengths=LENGTHS, importance="response")
    leaf = p.base.clone().requires_grad_()
    given = dict(p.arguments)
    ids, mask = given.pop("target_ids"), given.get("mask")
    del given["temperature"]
    logprobs, entropy = dk.selected_logprobs(
        p.view(leaf), ids, mask=mask, with_entropy=True, backend=use_backend
    )
    if mask is not None:  # what stands there has no effect
        logprobs, entropy = (torch.where(mask, x, torch.nan) for x in (logprobs, entropy))
    given["old_logprobs"], advantages = given["old_logprobs"], given.pop("advantages")
    old = given.pop("old_logprobs")
    out = dk.policy_loss_from_logprobs(
        logprobs, old, advantages, entropy=entropy, backend=use_backend, **given
    )
    (gradient,) = torch.autograd.grad(2 * out.loss, leaf, retain_graph=True)
    assert not out.logprobs.requires_grad and not out.entropy.requires_grad
    cleaned = out._replace(
        logprobs=out.logprobs.nan_to_num(), entropy=out.entropy.nan_to_num(), loss=out.loss.detach()
    )
    assert_matches(p, (cleaned, p.view(gradient)), p.oracle(with_entropy=True), scale=2.0)
    assert torch.equal(gradient, torch.autograd.grad(2 * out.loss, leaf)[0])  # may run again


MISTAKES = {
    "no grouping": ({"lengths": None}, "mask .* or lengths .* tell which tokens form a response"),
    "weights": ({"weights": torch.ones(3)}, r"weights must have one value per token"),
    "part too long": (
        {"response_lengths": [6, 0, 1, 8, 8]},
        r"response_lengths\[3\] is 8, fewer tokens",
    ),
    "part of no integers": ({"response_lengths": torch.ones(5)}, "response_lengths must be"),
    "part of other responses": (
        {"response_lengths": torch.tensor([3])},
        r"response_lengths must have one value per response, shape \[5\]",
    ),
    "part of one ratio": (
        {"objective": dk.gspo(), "response_lengths": LENGTHS},
        "pass response_log_ratio",
    ),
    "log-ratio per token": (
        {"response_log_ratio": torch.zeros(5)},
        "response_log_ratio is for objectives with one ratio per response",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_mistakes(case, backend):
    arguments, words = MISTAKES[case]
    p = problem(dk.dcpo(), lengths=LENGTHS)
    with pytest.raises((ValueError, TypeError), match=words):
        p.run(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["dppo-topk_tv", "dppo-kl"])
def test_logprobs_are_too_little_for_some(name):
    with pytest.raises(ValueError, match="takes more of a row than its log-probability"):
        dk.policy_loss_from_logprobs(
            torch.zeros(3), None, torch.ones(3), lengths=[3], objective=OBJECTIVES[name]()
        )
