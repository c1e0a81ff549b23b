from __future__ import annotations

import pytest
import torch

import dcpo_kernels as dk


def by_definition(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, over a response without gaps."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae(gamma, lam):
    # The second response has a tool's output in its middle, with NaN where nothing counts.
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 1, 1]])
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    garbage = torch.where(mask == 0, float("nan"), 0.0)
    out = dk.gae(rewards + garbage, values + garbage, mask, gamma, lam)
    for row, counts in enumerate(mask.bool()):
        expected = by_definition(
            rewards[row][counts].tolist(), values[row][counts].tolist(), gamma, lam
        )
        torch.testing.assert_close(out.advantages[row][counts], torch.tensor(expected))
        torch.testing.assert_close(
            out.returns[row][counts], torch.tensor(expected) + values[row][counts]
        )
    assert (out.advantages[mask == 0] == 0).all() and (out.returns[mask == 0] == 0).all()


def test_gae_with_lam_1_is_the_reward_to_go():
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    out = dk.gae(rewards, values, torch.ones(3, 6), gamma=1.0, lam=1.0)
    torch.testing.assert_close(out.returns, rewards.flip(1).cumsum(1).flip(1))


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)])
def test_nothing_to_estimate(shape):
    out = dk.gae(torch.zeros(shape), torch.zeros(shape), torch.ones(shape))
    assert out.advantages.shape == out.returns.shape == shape
    x = torch.zeros(shape)
    assert dk.value_loss(x, x, x, x) == (0, 0)


def test_gae_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[2, 5\], \[2, 5\], \[2, 4\]"):
        dk.gae(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 4))


def test_value_loss():
    values = torch.tensor([1.0, 1.0, 1.0, 5.0], requires_grad=True)
    old = torch.tensor([0.5, 0.5, 1.0, 5.0])
    returns = torch.tensor([2.0, 0.0, 1.5, float("nan")])
    mask = torch.tensor([1, 1, 1, 0])
    out = dk.value_loss(values, old, returns, mask, clip=0.2)
    # Clipped values 0.7, 0.7, 1.0: errors max(1, 1.69), max(1, 0.49), 0.25.
    torch.testing.assert_close(out.loss, torch.tensor(0.5 * (1.69 + 1.0 + 0.25) / 3))
    torch.testing.assert_close(out.clipped, torch.tensor(1 / 3))
    (gradient,) = torch.autograd.grad(out.loss, values)
    # The first token's loss is its clipped error, which does not move with the value.
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, -0.5, 0.0]) / 3)


def test_value_loss_refuses_nonsense():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="clip=0"):
        dk.value_loss(x, x, x, x, clip=0)
    with pytest.raises(ValueError, match="differ in shape"):
        dk.value_loss(x, x, torch.zeros(2), x)


def test_overlong_punishment():
    # DAPO eq. 13 with L_max = 100 and L_cache = 20
    lengths = torch.tensor([0, 80, 81, 90, 100, 101, 500])
    expected = torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0])
    torch.testing.assert_close(dk.overlong_punishment(lengths, 100, 20), expected)
    assert dk.overlong_punishment([90], 100, 20).tolist() == [-0.5]
    assert dk.overlong_punishment([], 100, 20).shape == (0,)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.float64):
        part = lengths[:-2].to(dtype)
        torch.testing.assert_close(dk.overlong_punishment(part, 100, 20), expected[:-2])
    with torch.device("meta"):  # torch.as_tensor would move them there
        assert dk.overlong_punishment(lengths, 100, 20).device.type == "cpu"
    for cache in (0, 101):
        with pytest.raises(ValueError, match=f"cache={cache}"):
            dk.overlong_punishment(lengths, 100, cache)
