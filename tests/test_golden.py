"""Every golden case on every backend: values computed outside the project in 50 digits and
float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GOLDEN, KERNELS, load_golden, on_backends, preset

import dcpo_kernels as dk
from dcpo_kernels.backends import reference
from dcpo_kernels.decide import binary_divergence, clip_bounds, decide

CLIPPED = ["none", "high", "low", "cap", "region"]
TOKENS = load_golden("token.json")["cases"]
TOKENS += load_golden("token2.json")["cases"]
KL_CASES = load_golden("token2.json")["kl_cases"]  # say nothing of the ratio and of what clipped it
BATCHES = load_golden("batches.json")


def expected(cases, key):
    return torch.tensor([case["expect"][key] for case in cases], dtype=torch.float64)


def by_objective():
    """Token cases grouped by objective, so that each group is one batch."""
    groups: dict[str, list] = {}
    for case in TOKENS + KL_CASES:
        name = f"{case['preset']} {case['params']} kl={case.get('kl_coef', 0.0)}"
        if "kl_to" in case:
            name += f" {case['kl_estimator']} to {case['kl_to']}"
        groups.setdefault(name, []).append(case)
    return groups


GROUPS = by_objective()
token_groups = pytest.mark.parametrize("cases", GROUPS.values(), ids=list(GROUPS))


def column(cases, key, default=None):
    return torch.tensor([case.get(key, default) for case in cases], dtype=torch.float64)


def objective_of(cases, **parts):
    case = cases[0]
    to = "old_kl" if case.get("kl_to") == "old" else "kl"
    parts |= {f"{to}_coef": case["kl_coef"]} if "kl_coef" in case else {}
    parts |= {f"{to}_estimator": case["kl_estimator"]} if "kl_to" in case else {}
    return preset(case["preset"], case["params"], **parts)


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


@on_backends()
@token_groups
def test_tokens_through_the_kernels(cases, use_backend):
    # Two logits whose softmax gives the case's probability: 0 for the target, log(1/p - 1) for the
    # other.
    logp, old, A = (column(cases, key) for key in ("logp", "old_logp", "advantage"))
    other = torch.log(torch.expm1(-logp)).float()
    logits = torch.stack([torch.zeros_like(other), other], 1).requires_grad_()
    out = dk.policy_loss(
        logits,
        torch.zeros(len(cases), dtype=torch.int64),
        old.float(),
        A.float(),
        lengths=[1] * len(cases),
        objective=objective_of(cases, aggregation="token-sum"),
        ref_logprobs=column(cases, "ref_logp", 0.0).float(),
        backend=use_backend,
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    # Float32 rounding of logp (|logp| 6e-8 and some) times what multiplies it.
    g = expected(cases, "dloss_dlogp")
    slack = 2e-6 * (1 + logp.abs()) * (1 + g.abs() + expected(cases, "loss").abs())
    assert ((out.token_loss.double() - expected(cases, "loss")).abs() <= slack).all()
    assert ((gradient[:, 0].double() + g * torch.expm1(logp)).abs() <= slack).all()
    assert ((gradient.sum(1)).abs() <= slack).all()
    if cases[0] in KL_CASES:
        return
    assert (
        (out.ratio.double() / expected(cases, "ratio") - 1).abs() <= 2e-6 * (1 + (logp - old).abs())
    ).all()
    assert [CLIPPED[c] for c in out.clipped] == [case["expect"]["clipped"] for case in cases]


def batch(entry):
    file = np.load(GOLDEN / entry["file"])
    arrays = {key: torch.as_tensor(file[key]) for key in file.files}
    assert arrays["logits"].shape == (entry["tokens"], entry["vocab"])
    arrays["old_logits"] = arrays.get("old_logits")
    if arrays["old_logits"] is not None:  # stored divided by the temperature
        arrays["old_logits"] = arrays["old_logits"] * entry["temperature"]
    objective = preset(
        entry["preset"],
        entry["params"],
        aggregation=entry["aggregation"],
        kl_coef=entry["kl_coef"],
        entropy_coef=entry["entropy_coef"],
    )
    assert objective.ratio_level == entry["ratio_level"]
    return objective, arrays


def run(entry, dtype, backend, layout="packed", **options):
    """policy_loss on a golden batch; padded spreads the responses over [B, T] with garbage between
    them."""
    objective, a = batch(entry)
    rows = {
        key: a.get(key)
        for key in ("target_ids", "old_logprobs", "ref_logprobs", "advantages", "topk_ids")
    }
    rows |= {
        "topk_logprobs": a.get("topk_logprobs"),
        "old_logits": a["old_logits"],
        "logits": a["logits"],
    }
    rows = {key: x for key, x in rows.items() if x is not None}
    grouping = {"lengths": a["lengths"]}
    if layout == "padded":
        mask = torch.arange(int(a["lengths"].max()) + 1) < a["lengths"][:, None]
        grouping = {"mask": mask}
        for key, x in rows.items():
            garbage = -100 if not x.is_floating_point() else float("nan")
            spread = torch.full((*mask.shape, *x.shape[1:]), garbage, dtype=x.dtype)
            spread[mask] = x
            rows[key] = spread
    for key in ("old_logprobs", "ref_logprobs", "advantages"):
        rows[key] = rows[key].to(torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = rows.pop("logits").to(dtype).requires_grad_()
    if "old_logits" in rows:
        rows["old_logits"] = rows["old_logits"].to(dtype)
    out = dk.policy_loss(
        leaf.clone(),  # in place wants logits that are not a leaf, nor a view of one
        **rows,
        **grouping,
        objective=objective,
        temperature=entry["temperature"],
        max_length=int(a["lengths"].max()),
        with_entropy=True,
        backend=backend,
        **options,
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    if layout == "padded":
        assert (gradient[~mask] == 0).all()
        gradient = gradient[mask]
        out = out._replace(
            **{
                key: getattr(out, key)[mask]
                for key in ("token_loss", "logprobs", "entropy", "ratio", "clipped")
            }
        )
    return a, out, gradient


# The logits are exact in bfloat16, so a low precision only rounds the gradient: half a unit in the
# last place.
GRADIENT_ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
batches = pytest.mark.parametrize(
    "entry", BATCHES, ids=[entry["file"].removesuffix(".npz") for entry in BATCHES]
)


@batches
def test_batch_in_float64(entry):
    a, out, gradient = run(entry, torch.float64, "reference")
    close = {"rtol": 1e-6, "atol": 1e-7}  # weights are float32
    for key in ("token_loss", "logprobs", "entropy"):
        torch.testing.assert_close(
            getattr(out, key), a[key], rtol=1e-6, atol=1e-6, check_dtype=False
        )
    torch.testing.assert_close(out.loss.detach(), a["loss"], **close, check_dtype=False)
    torch.testing.assert_close(gradient, a["dlogits"], **close)
    assert torch.equal(out.clipped, a["clipped"])


@batches
def test_divergence_in_float64(entry):
    objective, a = batch(entry)
    if "divergence" not in a:
        assert entry["preset"] != "dppo"
        return
    arguments = (a["logits"].double(), a["target_ids"], a["old_logprobs"], entry["temperature"])
    found = reference.divergence(
        objective.numbers.divergence,
        *arguments,
        a.get("topk_ids"),
        a.get("topk_logprobs"),
        a["old_logits"],
    )
    if found is None:
        found = binary_divergence(objective.numbers.divergence, a["logprobs"], a["old_logprobs"])
    torch.testing.assert_close(found, a["divergence"], rtol=1e-9, atol=1e-12)


@on_backends()
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", GRADIENT_ROUNDING, ids=str)
@batches
def test_batch_on_kernels(entry, dtype, layout, use_backend):
    if dtype == torch.float16 and not torch.equal(
        batch(entry)[1]["logits"].half().float(), batch(entry)[1]["logits"]
    ):
        dtype = torch.float32  # a logit beyond what float16 holds
    a, out, gradient = run(entry, dtype, use_backend, layout)
    for key, slack in (("logprobs", 2e-6), ("entropy", 4e-6)):
        torch.testing.assert_close(getattr(out, key).double(), a[key], rtol=2e-6, atol=slack)
    scale = 1 + a["token_loss"].abs()
    assert ((out.token_loss.double() - a["token_loss"]).abs() <= 1e-5 * scale).all()
    assert abs(float(out.loss) - float(a["loss"])) <= 1e-5 * float((a["weights"] * scale).sum())
    assert torch.equal(out.clipped, a["clipped"])
    # Rounding of the dtype on each entry, and float32 rounding on the coefficients that multiply
    # the row's probabilities: g (1 - p) is small where p is near 1, its error is that of g.
    pull = entry["kl_coef"] * torch.expm1(a["ref_logprobs"] - a["logprobs"]).abs()
    g = a["advantages"].abs() * out.ratio.double() + pull
    h = entry["entropy_coef"] * (1 + a["entropy"])
    coefficient = (a["weights"] * (g + h) / entry["temperature"])[:, None]
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    slack = GRADIENT_ROUNDING[dtype] * a["dlogits"].abs() + 5e-6 * coefficient + smallest
    assert ((gradient.double() - a["dlogits"]).abs() <= slack).all()
    index = torch.repeat_interleave(torch.arange(len(a["lengths"])), a["lengths"])
    sums = torch.zeros(len(a["lengths"]), dtype=torch.float64).index_add(0, index, a["token_loss"])
    means = sums / a["lengths"].clamp(min=1)
    torch.testing.assert_close(out.response_loss.double(), means, rtol=1e-5, atol=1e-5)


@batches
@on_backends(*(KERNELS[:1] or ["reference"]))
def test_in_place_is_the_same(entry, use_backend):
    _, out, gradient = run(entry, torch.float32, use_backend)
    _, out2, gradient2 = run(entry, torch.float32, use_backend, inplace=True)
    assert torch.equal(out.loss, out2.loss)
    assert torch.equal(gradient, gradient2)
