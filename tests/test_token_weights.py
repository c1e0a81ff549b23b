"""Token weights against the golden values and by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import load_golden

import dcpo_kernels as dk
from dcpo_kernels.responses import response_weights
from dcpo_kernels.objective import AGGREGATIONS

CASES = load_golden("aggregation.json")["cases"]


def expected(case):
    per_response = torch.tensor(case["per_response_weight"], dtype=torch.float64)
    return per_response.where(torch.tensor(case["lengths"]) > 0, 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['aggregation']}-{c['lengths']}")
def test_golden(case):
    lengths = torch.tensor(case["lengths"], dtype=torch.int64)
    options = {"max_length": case["max_length"]}
    each = response_weights(lengths, case["aggregation"], **options)
    torch.testing.assert_close(each.double(), expected(case), rtol=2e-7, atol=0)

    packed = dk.token_weights(lengths, case["aggregation"], **options)
    assert packed.dtype == torch.float32 and packed.shape == (sum(case["lengths"]),)
    assert torch.equal(packed, each.repeat_interleave(lengths))

    # Padded, the tokens that count anywhere in the row
    time = max(case["lengths"], default=0) + 3
    mask = torch.rand(len(lengths), time).argsort(1) < lengths[:, None]
    for given in (mask, mask.float(), mask * 2):
        padded = dk.token_weights(given, case["aggregation"], **options)
        assert torch.equal(padded, torch.where(mask, each[:, None], 0.0))


def test_golden_holds_every_aggregation():
    assert {case["aggregation"] for case in CASES} == set(AGGREGATIONS)
    assert any(0 in case["lengths"] for case in CASES)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizers_of_the_whole_batch(aggregation, as_tensor):
    """Weights of the micro-batches are those of the whole; without the normalizers they are not."""
    lengths = [3, 0, 5, 1, 0, 2]
    totals = {"num_responses": 4, "num_tokens": 11}
    if as_tensor:
        totals = {key: torch.tensor(value) for key, value in totals.items()}
    whole = dk.token_weights(lengths, aggregation, max_length=8)
    parts = [lengths[:2], lengths[2:3], [], lengths[3:]]
    found = [dk.token_weights(part, aggregation, **totals, max_length=8) for part in parts]
    torch.testing.assert_close(torch.cat(found), whole, rtol=2e-7, atol=0)
    alone = torch.cat([dk.token_weights(part, aggregation, max_length=8) for part in parts])
    assert torch.equal(alone, whole) == (aggregation in ("only-token-mean", "token-sum"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counts(aggregation):
    assert dk.token_weights([0, 0], aggregation, max_length=4).shape == (0,)
    assert (dk.token_weights(torch.zeros(2, 3), aggregation, max_length=4) == 0).all()
    assert dk.token_weights(torch.zeros(0, 3), aggregation, max_length=4).shape == (0, 3)
    assert dk.token_weights([], aggregation, max_length=4).shape == (0,)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([1], "mean"), "aggregation='mean' is not one of only-token-mean, "),
        (([1], "seq-mean-token-sum-norm"), "needs max_length"),
        ((torch.ones(1, 2, 3), "token-mean"), r"lengths \[R\] or a mask \[B, T\], .* \[1, 2, 3\]"),
        ((torch.tensor(3), "token-mean"), r"lengths \[R\] or a mask \[B, T\], got shape \[\]"),
        (([1.0, 2.0], "token-mean"), "lengths .*integers"),
        (([True, False], "token-mean"), "lengths .*integers"),
        (([2, -1], "token-mean"), r"lengths\[1\] is -1"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(ValueError, match=words):
        dk.token_weights(*arguments)
