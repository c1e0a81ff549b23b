"""Weights and masks for the mismatch of two engines, against golden values and verl."""

from __future__ import annotations

import math

import pytest
import torch
from golden import load

import dcpo_kernels as dk

CASES = load("token2.json")["rollout_cases"]


def padded(x, lengths):
    time = max(lengths) + 2
    out = torch.full((len(lengths), time), torch.nan, dtype=torch.float64)
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    out[mask] = torch.tensor(x, dtype=torch.float64)
    return out, mask


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['level']}-{c['mode']}-{c['low']}")
def test_golden(case):
    names = ("level", "mode", "low", "high")
    options = {name: case[name] for name in names}
    lengths = case["lengths"]
    expected = torch.tensor(case["weights"])
    old, rollout = (
        torch.tensor(case[name], dtype=torch.float64)
        for name in ("old_logprobs", "rollout_logprobs")
    )
    packed = dk.rollout_weights(old, rollout, lengths=lengths, **options)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)
    (old, mask), (rollout, _) = (
        padded(case[name], lengths) for name in ("old_logprobs", "rollout_logprobs")
    )
    found = dk.rollout_weights(old, rollout, mask=mask, **options)
    torch.testing.assert_close(found[mask], expected, rtol=1e-6, atol=0)
    assert (found[~mask] == 0).all()
    wide = {"lengths": [mask.shape[1]] * len(lengths), "mask": mask.flatten()}
    both = dk.rollout_weights(old.flatten(), rollout.flatten(), **wide, **options)
    assert torch.equal(both, found.flatten())


@pytest.fixture
def batch():
    old = -2 * torch.rand(5, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([9, 3, 0, 7, 1])[:, None]
    return old, old + 0.4 * torch.randn(5, 9), mask


@pytest.fixture(scope="module")
def verl():
    return pytest.importorskip(
        "verl.trainer.ppo.rollout_corr_helper", reason="verl is not installed"
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threshold", [1.2, "0.8_1.25"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_verls(verl, batch, level, threshold, normalize):
    old, rollout, mask = batch
    expected, _ = verl.compute_rollout_correction_weights(
        old - rollout, mask.double(), level, threshold, normalize
    )
    low, high = (0.8, 1.25) if isinstance(threshold, str) else (None, threshold)
    mode = "truncate" if low is None else "mask"
    found = dk.rollout_weights(
        old, rollout, mask=mask, level=level, mode=mode, low=low, high=high, normalize=normalize
    )
    torch.testing.assert_close(found[mask], expected[mask].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("statistic", ["k1", "k2", "k3"])
def test_masks_are_verls(verl, batch, statistic, over):
    if (statistic, over) == ("k1", "max"):
        pytest.skip("verl has none")
    old, rollout, mask = batch
    name = f"{'token' if over == 'token' else f'seq_{over}'}_{statistic}"
    high = {"token": 0.05, "sum": 0.5, "mean": 0.12, "max": 0.4}[over]
    bounds = {"low": math.log(0.9), "high": math.log(1.2)} if statistic == "k1" else {"high": high}
    threshold = "0.9_1.2" if statistic == "k1" else str(high)
    expected, _ = verl.compute_rollout_rejection_mask(old - rollout, mask.double(), name, threshold)
    given = {"statistic": statistic, "over": over, **bounds}
    found = dk.rollout_mask(old, rollout, mask=mask, **given)
    assert torch.equal(found, expected != 0)
    assert 0 < found.sum() < mask.sum()
    lengths = mask.sum(1)
    packed = dk.rollout_mask(old[mask], rollout[mask], lengths=lengths, **given)
    assert torch.equal(packed, found[mask])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"level": "word"}, "level='word' is not one of token"),
        ({"mode": "clip"}, "mode='clip' is not one of truncate"),
        ({"low": 2.0, "high": 1.0}, "0 <= low <= high"),
        ({"lengths": None}, "got neither"),
        ({"mask": torch.ones(2)}, r"mask must have shape \[3\], got \[2\]"),
        ({"rollout_logprobs": torch.ones(2)}, r"shape of old_logprobs, \[3\], got \[2\]"),
    ],
)
def test_mistakes(change, words):
    given = {"old_logprobs": torch.zeros(3), "rollout_logprobs": torch.zeros(3), "lengths": [3]}
    with pytest.raises(ValueError, match=words):
        dk.rollout_weights(**{**given, **change})
    with pytest.raises(ValueError, match="over='all' is not one of token"):
        dk.rollout_mask(**given, over="all")
