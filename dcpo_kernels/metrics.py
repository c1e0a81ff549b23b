"""The numbers a run is watched by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dcpo_kernels.objectives import CLIP_CAP, CLIP_HIGH, CLIP_LOW, CLIP_NONE, CLIP_REGION

if TYPE_CHECKING:
    from dcpo_kernels.losses import PolicyLoss


def _share(hit: Tensor, mask: Tensor) -> Tensor:
    return (hit & mask).sum() / mask.sum().clamp(min=1)


def token_clipping_ratio(out: PolicyLoss | Iterable[PolicyLoss]) -> Tensor:
    """TCR (DCPO section 4.1): clipped tokens / tokens of a micro-batch, averaged over
    micro-batches. Scalar float32.

    A token is clipped when its trust region stopped it: `clipped` is not 0. The official code
    leaves out those beyond the cap for A < 0; `summarize` counts each kind.
    """
    outs = cast("list[PolicyLoss]", [out] if hasattr(out, "clipped") else list(out))
    if not outs:
        raise ValueError("token_clipping_ratio needs at least one micro-batch")
    return torch.stack([_share(o.clipped != CLIP_NONE, o.mask) for o in outs]).mean()


def response_utilization_ratio(advantages: Tensor) -> Tensor:
    """RUR (DCPO section 4.1): responses with a non-zero advantage / responses. advantages: [R].
    Scalar float32."""
    if advantages.dim() != 1 or len(advantages) == 0:
        raise ValueError(
            f"advantages must be [R], one a response, at least one; got shape "
            f"{list(advantages.shape)}"
        )
    return (advantages != 0).float().mean()


def summarize(out: PolicyLoss) -> dict[str, float]:
    """The usual numbers of one loss as floats; waits for the GPU once.

    ratio_*: over tokens that count. approx_kl: mean of (r - 1) - log r, an estimate of KL(old ||
    new) (Schulman's k3). clip_*: share of tokens by the side that clipped them;
    token_clipping_ratio is their sum.
    """
    mask = out.mask
    tokens = mask.sum()
    n = tokens.clamp(min=1)
    ratio = torch.where(mask, out.ratio, 1.0)
    if ratio.numel():
        lowest = torch.where(mask, out.ratio, torch.inf).amin()
        highest = torch.where(mask, out.ratio, -torch.inf).amax()
    else:
        lowest = highest = ratio.new_ones(())
    numbers = {
        "loss": out.loss.detach(),
        "tokens": tokens,
        "responses": torch.tensor(len(out.response_loss), device=mask.device),
        "logprob_mean": torch.where(mask, out.logprobs, 0.0).sum() / n,
        "ratio_mean": torch.where(mask, ratio, 0.0).sum() / n,
        "ratio_min": lowest.where(tokens > 0, 1.0),
        "ratio_max": highest.where(tokens > 0, 1.0),
        "approx_kl": (ratio - 1 - ratio.log()).sum() / n,
        "token_clipping_ratio": _share(out.clipped != CLIP_NONE, mask),
        "clip_high": _share(out.clipped == CLIP_HIGH, mask),
        "clip_low": _share(out.clipped == CLIP_LOW, mask),
        "clip_cap": _share(out.clipped == CLIP_CAP, mask),
        "clip_region": _share(out.clipped == CLIP_REGION, mask),
    }
    if out.entropy is not None:
        numbers["entropy_mean"] = torch.where(mask, out.entropy, 0.0).sum() / n
    values = torch.stack([value.to(torch.float64) for value in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))
