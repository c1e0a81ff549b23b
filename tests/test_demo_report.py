"""The table says what was measured, and who is ahead only where noise does not explain it."""

from __future__ import annotations

import pytest
import torch
from train_world import small_trainer

from dcpo_kernels.demo import timing
from dcpo_kernels.demo.report import Row, Value, leader, loss_shares, mean_over_steps, verdict
from dcpo_kernels.losses import policy_loss
from dcpo_kernels.train import recipes


def row(better, **values):
    return Row("accuracy", None, {k: Value(*v) for k, v in values.items()}, "percent", better)


def test_who_is_ahead():
    assert leader(row("higher", grpo=(0.70, 0.01), dcpo=(0.60, 0.01))) == "grpo"
    assert leader(row("lower", grpo=(0.70, 0.01), dcpo=(0.60, 0.01))) == "dcpo"
    assert leader(row("higher", grpo=(0.70, 0.04), dcpo=(0.60, 0.04))) == "even"
    assert leader(row("higher", grpo=(0.70, 0), dcpo=(0.70, 0))) == "even"
    assert leader(row("higher", a=(0.1, 0), b=(0.9, 0.01), c=(0.5, 0.01))) == "b"
    assert leader(row("", grpo=(0.70, 0), dcpo=(0.60, 0))) == ""
    assert leader(row("higher", dcpo=(0.60, 0))) == ""
    rows = [row("higher", grpo=(0.7, 0), dcpo=(0.6, 0)), row("lower", grpo=(0.7, 9), dcpo=(0.6, 9))]
    rows[1] = rows[1]._replace(label="TCR, mean")
    assert verdict(rows, ["grpo", "dcpo"]) == "grpo is ahead: accuracy. Even: TCR."


def test_numbers_of_a_run():
    history = [
        {"rur": 0.2, "seconds_step": 2.0, "tokens": 100},
        {"rur": 0.6, "seconds_step": 3.0, "tokens": 150},
    ]
    mean, error = mean_over_steps(history, "rur")
    assert (mean, error) == (pytest.approx(0.4), pytest.approx(0.2))
    shares = loss_shares(history, {"ours": 0.0016, "plain": 0.01})
    # 0.4 of 5 seconds; with plain PyTorch 2.5 seconds in place of the 0.4
    assert shares == {"ours": pytest.approx(0.08), "plain": pytest.approx(2.5 / 7.1)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("method", list(recipes()))
def test_the_plain_loss_is_the_same_loss(method, temperature):
    """What ours is timed against computes the same numbers."""
    config = recipes(temperature=temperature)[method]
    lengths = torch.tensor([3, 1, 4])
    data = (torch.randint(0, 50, (8,)), -3 + torch.randn(8), torch.tensor([1.5, -2.0, 0.0]))
    parts = {
        "lengths": lengths,
        "objective": config.objective,
        "temperature": temperature,
        "num_responses": 5,
        "num_tokens": 20,
        "max_length": 6,
    }
    results = []
    start = torch.randn(8, 50)
    for loss in (
        lambda logits, *a, **k: timing.plain.policy_loss(*a, **k)(logits),
        lambda *a, **k: policy_loss(*a, **k).loss,
    ):
        logits = start.clone().requires_grad_()
        value = loss(logits, *data, **parts)
        results.append((value.detach(), *torch.autograd.grad(value, logits)))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert results[0][1].abs().max() > 0


def test_loss_seconds():
    trainer = small_trainer()
    with pytest.raises(ValueError, match="has not made a step"):
        timing.loss_seconds(trainer)
    trainer.step()
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    seconds = timing.loss_seconds(trainer, repetitions=1)
    assert set(seconds) == {"ours", "every_row", "logits", "plain"}
    assert all(value > 0 for value in seconds.values())
    assert all(map(torch.equal, weights, trainer.model.parameters()))
    assert all(p.grad is None for p in trainer.model.parameters())
