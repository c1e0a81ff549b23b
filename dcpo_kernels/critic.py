"""For those who train with a critic: generalized advantages and the clipped value loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Returns(NamedTuple):
    """Both [B, T] float32, 0 where the mask is."""

    advantages: Tensor
    returns: Tensor  # what the critic should have said


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Returns:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16) over the tokens that count.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, t + 1 being the next
    token whose mask is not 0: a tool's output in the middle of a response is stepped over. A
    response ends with its last such token; V is 0 after it.

    rewards, values: [B, T] floats. mask: [B, T], nonzero where a token counts; what stands in the
    others has no effect. Nothing is differentiable. Advantages are not standardized.
    """
    if rewards.dim() != 2 or rewards.shape != values.shape or rewards.shape != mask.shape:
        raise ValueError(
            "rewards, values and mask must share one shape [B, T], got "
            f"{list(rewards.shape)}, {list(values.shape)}, {list(mask.shape)}"
        )
    counts = mask != 0
    r = torch.where(counts, rewards.detach(), 0.0).to(torch.float32)
    v = torch.where(counts, values.detach(), 0.0).to(torch.float32)
    next_value, next_advantage = r.new_zeros(len(r)), r.new_zeros(len(r))
    columns = []
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(counts[:, t], v[:, t], next_value)
        next_advantage = torch.where(counts[:, t], advantage, next_advantage)
        columns.append(torch.where(counts[:, t], advantage, 0.0))
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(r)
    return Returns(advantages, torch.where(counts, advantages + v, 0.0))


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar, differentiable in the values
    clipped: Tensor  # share of tokens whose clipped error is the larger one


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> ValueLoss:
    """1/2 mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) over tokens that count.

    The critic's half of PPO as its authors' code has it (openai/baselines, ppo2). All [B, T] or
    [N]; what stands where the mask is 0 has no effect.
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be > 0")
    if not values.shape == old_values.shape == returns.shape == mask.shape:
        shapes = [list(x.shape) for x in (values, old_values, returns, mask)]
        raise ValueError(f"values, old_values, returns and mask differ in shape: {shapes}")
    counts = mask != 0
    v = torch.where(counts, values, 0.0).to(torch.float32)
    old = torch.where(counts, old_values.detach(), 0.0).to(torch.float32)
    target = torch.where(counts, returns.detach(), 0.0).to(torch.float32)
    error = (v - target) ** 2
    clipped_error = (old + (v - old).clamp(-clip, clip) - target) ** 2
    n = counts.sum().clamp(min=1)
    return ValueLoss(
        0.5 * torch.maximum(error, clipped_error).sum() / n,
        ((clipped_error > error) & counts).sum() / n,
    )
