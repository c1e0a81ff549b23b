"""Every golden case on every backend: values computed outside the project in 50 digits and
float64."""

from __future__ import annotations

import golden
import pytest
import torch
from backends import CPU, EVERYWHERE, on_backends
from golden import BATCHES, GROUPS, KL_CASES
from problems import DTYPES, Problem

from dcpo_kernels.backends import reference
from dcpo_kernels.decide import binary_divergence, clip_bounds, decide

CLIPPED = ["none", "high", "low", "cap", "region"]
token_groups = pytest.mark.parametrize("cases", GROUPS.values(), ids=list(GROUPS))
batches = pytest.mark.parametrize("entry", BATCHES.values(), ids=list(BATCHES))


def expected(cases, key):
    return torch.tensor([case["expect"][key] for case in cases], dtype=torch.float64)


def column(cases, key, default=None):
    return torch.tensor([case.get(key, default) for case in cases], dtype=torch.float64)


def objective_of(cases, **parts):
    case = cases[0]
    to = "old_kl" if case.get("kl_to") == "old" else "kl"
    parts |= {f"{to}_coef": case["kl_coef"]} if "kl_coef" in case else {}
    parts |= {f"{to}_estimator": case["kl_estimator"]} if "kl_to" in case else {}
    return golden.preset(case["preset"], case["params"], **parts)


def test_groups_hold_every_case():
    assert sum(map(len, GROUPS.values())) == 1341 + 954 + 120
    assert len(KL_CASES) == 120


@token_groups
def test_decide_in_float64(cases):
    logp = column(cases, "logp").requires_grad_()
    decision = decide(
        objective_of(cases).numbers,
        logp,
        column(cases, "old_logp"),
        column(cases, "advantage"),
        ref_logprobs=column(cases, "ref_logp", 0.0),
    )
    (autograd,) = torch.autograd.grad(decision.loss.sum(), logp)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(decision.loss.detach(), expected(cases, "loss"), **close)
    torch.testing.assert_close(decision.g, expected(cases, "dloss_dlogp"), **close)
    torch.testing.assert_close(autograd, expected(cases, "dloss_dlogp"), **close)
    if cases[0] not in KL_CASES:
        torch.testing.assert_close(decision.ratio, expected(cases, "ratio"), **close)
        clipped = [case["expect"]["clipped"] for case in cases]
        assert [CLIPPED[c] for c in decision.clipped] == clipped


@token_groups
def test_bounds_in_float64(cases):
    bounded = [case for case in cases if case["expect"].get("low") is not None]
    if not bounded:
        bounds = ("clip", "dynamic-clip", "inverse-sqrt-clip")
        assert cases[0] in KL_CASES or objective_of(cases).surrogate not in bounds
        return
    low, high = clip_bounds(objective_of(bounded).numbers, column(bounded, "old_logp"))
    torch.testing.assert_close(low, expected(bounded, "low"), rtol=1e-10, atol=0)
    torch.testing.assert_close(high, expected(bounded, "high"), rtol=1e-10, atol=0)


@on_backends(*EVERYWHERE)
@token_groups
def test_tokens_through_the_kernels(cases, use_backend):
    # Two logits whose softmax gives the case's probability: 0 for the target, log(1/p - 1) for the
    # other.
    logp, old, A = (column(cases, key) for key in ("logp", "old_logp", "advantage"))
    other = torch.log(torch.expm1(-logp)).float()
    arguments = {
        "target_ids": torch.zeros(len(cases), dtype=torch.int64),
        "old_logprobs": old.float(),
        "advantages": A.float(),
        "lengths": [1] * len(cases),
        "objective": objective_of(cases, aggregation="token-sum"),
        "ref_logprobs": column(cases, "ref_logp", 0.0).float(),
    }
    p = Problem(torch.stack([torch.zeros_like(other), other], 1), lambda x: x, arguments)
    out, gradient = p.run(backend=use_backend)
    # Float32 rounding of logp (|logp| 6e-8 and some) times what multiplies it.
    g = expected(cases, "dloss_dlogp")
    slack = 2e-6 * (1 + logp.abs()) * (1 + g.abs() + expected(cases, "loss").abs())
    assert ((out.token_loss.double() - expected(cases, "loss")).abs() <= slack).all()
    assert ((gradient[:, 0].double() + g * torch.expm1(logp)).abs() <= slack).all()
    assert ((gradient.sum(1)).abs() <= slack).all()
    if cases[0] in KL_CASES:
        return
    ratio = expected(cases, "ratio")
    assert ((out.ratio.double() / ratio - 1).abs() <= 2e-6 * (1 + (logp - old).abs())).all()
    assert [CLIPPED[c] for c in out.clipped] == [case["expect"]["clipped"] for case in cases]


@batches
def test_batch_in_float64(entry):
    a = golden.arrays(entry)
    p = golden.batch(entry, a, torch.float64, "packed")
    out, gradient = p.run(backend="reference", with_entropy=True)
    close = {"rtol": 1e-6, "atol": 1e-7, "check_dtype": False}  # weights are float32
    for key in ("token_loss", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(out, key), a[key], **{**close, "atol": 1e-6})
    torch.testing.assert_close(out.loss.detach(), a["loss"], **close)
    torch.testing.assert_close(gradient, a["dlogits"], rtol=1e-6, atol=1e-7)
    assert torch.equal(out.clipped, a["clipped"])


@batches
def test_divergence_in_float64(entry):
    a = golden.arrays(entry)
    if "divergence" not in a:
        assert entry["preset"] != "dppo"
        return
    kind = golden.objective_of(entry).numbers.divergence
    found = reference.divergence(
        kind, a["logits"].double(), a["target_ids"], a["old_logprobs"], entry["temperature"],
        a.get("topk_ids"), a.get("topk_logprobs"), a.get("old_logits"),
    )  # fmt: skip
    if found is None:
        found = binary_divergence(kind, a["logprobs"], a["old_logprobs"])
    torch.testing.assert_close(found, a["divergence"], rtol=1e-9, atol=1e-12)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@batches
def test_batch_on_kernels(entry, dtype, layout, use_backend):
    golden.check(entry, golden.arrays(entry), dtype, layout, use_backend)


@batches
@on_backends(*CPU[:1])
def test_in_place_is_the_same(entry, use_backend):
    p = golden.batch(entry, golden.arrays(entry), torch.float32, "packed")
    out, gradient = p.run(backend=use_backend, with_entropy=True)
    out2, gradient2 = p.run(backend=use_backend, with_entropy=True, inplace=True)
    assert torch.equal(out.loss, out2.loss)
    assert torch.equal(gradient, gradient2)
