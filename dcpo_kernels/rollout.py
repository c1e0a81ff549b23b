"""Corrections for the mismatch between the engine that sampled and the one that trains, from
log-probabilities that are there before any logit is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.objective import MAX_LOG_RATIO

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")
STATISTICS = ("k1", "k2", "k3")
OVER = ("token", "sum", "mean", "max")


class _Responses:
    """Sums and the like over the tokens of each response that count, and back to its tokens."""

    def __init__(
        self, like: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None
    ) -> None:
        if mask is None and lengths is None:
            raise ValueError(
                "mask [B, T] (padded) or lengths [R] (packed) tell which tokens form a response; "
                "got neither"
            )
        self.mask = torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0
        if self.mask.shape != like.shape:
            raise ValueError(
                f"mask must have shape {list(like.shape)}, got {list(self.mask.shape)}"
            )
        self.lengths = None
        if lengths is not None:
            self.lengths = torch.as_tensor(lengths, device=like.device).to(torch.int64)
        elif like.dim() != 2:
            raise ValueError(f"a mask alone goes with [B, T], got {list(like.shape)}")

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """[R]: "sum", "mean" or "max" of x over the tokens that count; 0 where there are none."""
        nothing = -torch.inf if how == "max" else 0.0
        values = torch.where(self.mask, x, nothing)
        counts = self.mask.to(x.dtype)
        if self.lengths is None:
            totals = values.amax(1) if how == "max" else values.sum(1)
            counted = counts.sum(1)
        else:
            rows: Any = {"lengths": self.lengths, "initial": nothing}
            reduction = "max" if how == "max" else "sum"
            totals = torch.segment_reduce(values.flatten(), reduction, **rows)
            counted = torch.segment_reduce(counts.flatten(), "sum", lengths=self.lengths)
        if how == "mean":
            totals = totals / counted.clamp(min=1)
        return torch.where(counted > 0, totals, 0.0)

    def spread(self, x: Tensor) -> Tensor:
        """[R] to one per token."""
        if self.lengths is None:
            return x[:, None].expand(self.mask.shape)
        return x.repeat_interleave(self.lengths).view(self.mask.shape)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def _log_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    if old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"rollout_logprobs must have the shape of old_logprobs, {list(old_logprobs.shape)}, "
            f"got {list(rollout_logprobs.shape)}"
        )
    dtype = torch.promote_types(old_logprobs.dtype, torch.float32)
    return torch.where(mask, old_logprobs.to(dtype) - rollout_logprobs.to(dtype), 0.0).detach()


def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Importance weights w = exp(old - rollout) per token, for `policy_loss(importance_weights=)`.

    old_logprobs, rollout_logprobs: [N] packed or [B, T] padded: of the sampled tokens under the
        policy before the update, by the engine that trains and by the one that sampled.
    mask, lengths: as in `policy_loss`. What doesn't count gets 0.
    level: "token"; "sequence": the product over a response, for each of its tokens; "geometric":
        its geometric mean.
    mode: "truncate" cuts w to [low, high] (TIS; TRL's *_truncate, verl's rollout_is);
        "mask" makes it 0 outside (IcePop; TRL's *_mask). low or high None: no bound there.
    normalize: divide by the mean over tokens (over responses, for the two others), as verl's
        rollout_is_batch_normalize.

    Returns float32, of the shape of old_logprobs, without a gradient. Log-ratios are clamped to
    +-20 first.
    """
    _one_of("level", level, LEVELS)
    _one_of("mode", mode, MODES)
    lowest, highest = 0.0 if low is None else low, float("inf") if high is None else high
    if not 0 <= lowest <= highest:
        raise ValueError(f"low={low} and high={high} must be 0 <= low <= high")
    responses = _Responses(old_logprobs, mask, lengths)
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, responses.mask)
    if level != "token":
        log_ratio = responses.reduce(log_ratio, "sum" if level == "sequence" else "mean")
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        weights = weights.clamp(lowest, highest)
    else:
        weights = torch.where((weights < lowest) | (weights > highest), 0.0, weights)
    if normalize:
        counted = responses.mask if level == "token" else _counted(responses)
        mean = torch.where(counted, weights, 0.0).sum() / counted.sum().clamp(min=1)
        weights = torch.where(mean > 1e-8, weights / mean, weights)
    if level != "token":
        weights = responses.spread(weights)
    return torch.where(responses.mask, weights, 0.0).to(torch.float32)


def _counted(responses: _Responses) -> Tensor:
    return responses.reduce(responses.mask.to(torch.float32), "sum") > 0


def rollout_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    statistic: str = "k3",
    over: str = "token",
    low: float = -float("inf"),
    high: float = float("inf"),
) -> Tensor:
    """Which tokens are close enough to the policy that sampled them (verl's rollout_rs).

    statistic: of x = old - rollout, k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x (estimates of a KL
        divergence). over: "token", or one number for a response, the "sum", "mean" or "max" over
        its tokens that count.
    low, high: where the statistic may lie, in nats: verl's "0.5_2.0" for k1 is low=log 0.5,
        high=log 2.

    Returns bool, of the shape of old_logprobs: a mask for `policy_loss`, a part of the one given.
    """
    _one_of("statistic", statistic, STATISTICS)
    _one_of("over", over, OVER)
    responses = _Responses(old_logprobs, mask, lengths)
    x = _log_ratio(old_logprobs, rollout_logprobs, responses.mask)
    x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    value = {"k1": -x, "k2": 0.5 * x * x, "k3": torch.expm1(x) - x}[statistic]
    if over != "token":
        value = responses.spread(responses.reduce(value, over))
    return responses.mask & (value >= low) & (value <= high)
