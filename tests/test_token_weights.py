"""Token weights against the golden values and by hand."""

from __future__ import annotations

import golden
import pytest
import torch
from backends import on_backends

import dcpo_kernels as dk
from dcpo_kernels.objective import AGGREGATIONS
from dcpo_kernels.responses import response_weights

CASES = golden.load("aggregation.json")["cases"]


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
    by_hand = {"seq-mean-token-sum"}  # in the test below
    assert {case["aggregation"] for case in CASES} == set(AGGREGATIONS) - by_hand
    assert any(0 in case["lengths"] for case in CASES)


def test_token_sums_over_responses():
    weights = dk.token_weights([2, 0, 1], "seq-mean-token-sum")
    assert weights.tolist() == [0.5, 0.5, 0.5]
    assert (
        dk.token_weights([2, 0, 1], "seq-mean-token-sum", num_responses=8).tolist() == [1 / 8] * 3
    )


INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
INTEGERS += (torch.int8, torch.int16, torch.int32)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_integers_of_any_width(aggregation, dtype):
    """Their sum and the product of two normalizers exceed the narrow ones."""
    lengths = torch.tensor([100, 0, 120, 100])
    totals = {"num_responses": torch.tensor(100), "max_length": torch.tensor(120)}
    expected = dk.token_weights(lengths, aggregation, **totals)
    narrow = {key: value.to(dtype) for key, value in totals.items()}
    found = dk.token_weights(lengths.to(dtype), aggregation, **narrow)
    assert torch.equal(found, expected)
    assert torch.equal(dk.token_weights(lengths.to(dtype).numpy(), aggregation, **totals), expected)

    logits, ids = torch.randn(320, 5), torch.zeros(320, dtype=torch.int64)
    objective = dk.dcpo(aggregation=aggregation)
    arguments = logits, ids, torch.full((320,), -1.0), torch.ones(4)
    a, b = (
        dk.policy_loss(*arguments, lengths=n, objective=objective, **totals).loss
        for n in (lengths, lengths.to(dtype))
    )
    assert torch.equal(a, b)


def test_weights_stay_on_the_device_of_the_lengths():
    """torch.as_tensor would move them to the default one."""
    lengths, mask = torch.tensor([2, 1]), torch.tensor([[1, 1], [1, 0]])
    with torch.device("meta"):  # as torch.set_default_device, which would stay
        packed = dk.token_weights(lengths, "only-token-mean")
        padded = dk.token_weights(mask, "only-token-mean")
    assert packed.tolist() == [0.5, 0.5, 1] and padded.tolist() == [[0.5, 0.5], [1, 0]]


@on_backends()
@pytest.mark.parametrize("objective", [dk.dcpo(), dk.gspo()], ids=lambda o: o.name)
@pytest.mark.parametrize("lengths", [[4, 2], torch.tensor([4, 2])], ids=["list", "tensor"])
def test_a_loss_beside_another_default_device(use_backend, objective, lengths):
    logits, ids = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)
    old, advantages = torch.full((6,), -1.0), torch.ones(2)

    def numbers():
        x = logits.clone().requires_grad_()
        out = dk.policy_loss(
            x, ids, old, advantages, lengths=lengths, objective=objective, backend=use_backend
        )
        out.loss.backward()
        return dk.summarize(out), x.grad.tolist()

    expected = numbers()
    with torch.device("meta"):
        assert numbers() == expected


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
