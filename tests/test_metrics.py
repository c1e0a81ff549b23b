"""The numbers of a run against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from backends import on_backends
from problems import OBJECTIVES, per_token, problem

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.ops.records import Responses, Results


def made_up(clipped, mask, **fields):
    """A PolicyLoss with these fields and nothing else in it."""
    clipped, mask = torch.tensor(clipped, dtype=torch.int8), torch.tensor(mask) > 0
    zeros = torch.zeros(clipped.shape)
    defaults = {
        "loss": torch.tensor(0.25, requires_grad=True),
        "token_loss": zeros,
        "logprobs": zeros,
        "entropy": None,
        "ratio": zeros + 1,
        "response_loss": torch.zeros(2),
    }
    values = {key: torch.tensor(value) for key, value in fields.items()}
    out = {**defaults, "clipped": clipped, "mask": mask, **values}
    entropy = torch.zeros(0) if out["entropy"] is None else out["entropy"]
    results = Results(zeros, out["logprobs"], entropy, out["ratio"], clipped)
    # all tokens as one response
    ends = torch.tensor([0, mask.numel()])
    responses = Responses(mask.float(), mask, ends, mask.sum().view(1))
    summary = ops.finish(*results, *responses, "reference")[2]
    summary[0] = out["loss"].detach()
    return dk.PolicyLoss(**out, summary=summary)


def test_token_clipping_ratio():
    one = made_up([1, 0, 2, 0, 3, 4], [1, 1, 1, 1, 1, 0])
    assert dk.token_clipping_ratio(one).item() == pytest.approx(3 / 5)
    two = made_up([0, 0, 4], [1, 1, 1])
    empty = made_up([1, 1], [0, 0])
    # the mean of the micro-batches' shares (DCPO section 4.1), not the share of all tokens
    assert dk.token_clipping_ratio([one, two]).item() == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert dk.token_clipping_ratio(iter((one, two, empty))).item() == pytest.approx(14 / 15 / 3)
    assert dk.token_clipping_ratio(empty).item() == 0
    assert dk.token_clipping_ratio(one).dtype == torch.float32
    with pytest.raises(ValueError, match="at least one micro-batch"):
        dk.token_clipping_ratio([])


def test_response_utilization_ratio():
    rur = dk.response_utilization_ratio(torch.tensor([0.0, 1e-20, -3.0, 0.0, -0.0]))
    assert rur.item() == pytest.approx(2 / 5) and rur.dtype == torch.float32
    assert dk.response_utilization_ratio(torch.zeros(3)).item() == 0
    for wrong in (torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"advantages must be \[R\].*got shape"):
            dk.response_utilization_ratio(wrong)


def test_summarize():
    nan = float("nan")
    out = made_up(
        [[1, 0, 2], [3, 4, 1]],
        [[1, 1, 1], [1, 1, 0]],
        ratio=[[1.5, 1.0, 0.5], [4.0, 2.0, nan]],
        logprobs=[[-1.0, -2.0, -3.0], [-4.0, -0.5, nan]],
        entropy=[[1.0, 2.0, 3.0], [4.0, 0.0, nan]],
    )
    assert dk.summarize(out) == pytest.approx(
        {
            "loss": 0.25,
            "tokens": 5,
            "tokens_read": 5,
            "tokens_dropped": 0,
            "responses": 2,
            "logprob_mean": -10.5 / 5,
            "ratio_mean": 9 / 5,
            "ratio_min": 0.5,
            "ratio_max": 4.0,
            "approx_kl": sum(r - 1 - math.log(r) for r in (1.5, 1.0, 0.5, 4.0, 2.0)) / 5,
            "token_clipping_ratio": 4 / 5,
            "clip_high": 1 / 5,
            "clip_low": 1 / 5,
            "clip_cap": 1 / 5,
            "clip_region": 1 / 5,
            "entropy_mean": 2.0,
        }
    )
    assert all(type(value) is float for value in dk.summarize(out).values())
    assert "entropy_mean" not in dk.summarize(out._replace(entropy=None))


def test_ratios_on_one_side_of_1():
    """Tokens that don't count have ratio 1, which must not show as a minimum or maximum."""
    above = made_up([[0, 0]], [[1, 0]], ratio=[[3.0, 1.0]])
    below = made_up([[0, 0]], [[1, 0]], ratio=[[0.25, 1.0]])
    assert dk.summarize(above)["ratio_min"] == 3.0
    assert dk.summarize(below)["ratio_max"] == 0.25


def test_a_nan_shows():
    out = made_up([0, 0], [1, 1], ratio=[1.0, float("nan")])
    numbers = dk.summarize(out)
    assert all(math.isnan(numbers[key]) for key in ("ratio_mean", "ratio_max", "approx_kl"))


def test_nothing_counts():
    for out in (made_up([[0, 0]], [[0, 0]]), made_up([], [])):
        numbers = dk.summarize(out)
        assert numbers["tokens"] == 0 and numbers["ratio_mean"] == 0
        assert all(math.isfinite(value) for value in numbers.values())


@on_backends()
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_of_a_real_loss(name, layout, skip, use_backend):
    """Rows that skip_zero_advantage leaves out have results of 0, which are in no mean."""
    p = problem(OBJECTIVES[name](), layout=layout, lengths=(6, 5, 9, 4), advantages="response")
    p.arguments["advantages"][1::2] = 0.0
    out, _ = p.run(backend=use_backend, with_entropy=True, skip_zero_advantage=skip)
    numbers, mask = dk.summarize(out), out.mask
    skipped = skip and not p.arguments["objective"].pulls_without_advantage
    read = mask & (per_token(torch.tensor([1, 0, 1, 0]), p.arguments) > 0) if skipped else mask
    assert numbers["tokens"] == mask.sum() == 24 and numbers["responses"] == 4
    assert numbers["tokens_read"] == read.sum() == (15 if skipped else 24)
    assert numbers["loss"] == pytest.approx(float(out.loss.detach()))
    assert numbers["token_clipping_ratio"] == pytest.approx(float(dk.token_clipping_ratio(out)))
    assert numbers["token_clipping_ratio"] == pytest.approx(float((out.clipped != 0).sum()) / 24)
    sides = sum(numbers[f"clip_{side}"] for side in ("high", "low", "cap", "region"))
    assert sides == pytest.approx(int((out.clipped[mask] != 0).sum()) / 24)
    for key, values in (("logprob", out.logprobs), ("entropy", out.entropy), ("ratio", out.ratio)):
        assert numbers[f"{key}_mean"] == pytest.approx(float(values[read].mean()), rel=1e-5)
    ratio = out.ratio[read]
    assert (numbers["ratio_min"], numbers["ratio_max"]) == (float(ratio.min()), float(ratio.max()))
    assert numbers["approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)
