"""The numbers a run is watched by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from dcpo_kernels.objective import CLIPPED

if TYPE_CHECKING:
    from dcpo_kernels.losses import PolicyLoss


class Summary(NamedTuple):
    """Numbers of a whole call, in the order in which the operator `finish` stores them. Sums,
    minima and maxima are over the rows that were read."""

    loss: float
    tokens: float  # that count
    tokens_read: float
    logprob_sum: float
    entropy_sum: float
    ratio_sum: float
    ratio_min: float  # 1 where no row was read, as ratio_max
    ratio_max: float
    kl_sum: float  # of (r - 1) - log r
    clip_high: float  # tokens by the side that clipped them
    clip_low: float
    clip_cap: float
    clip_region: float
    tokens_dropped: float  # by drop_nonfinite; `finish` stores 0


def token_clipping_ratio(out: PolicyLoss | Iterable[PolicyLoss]) -> Tensor:
    """TCR (DCPO section 4.1): clipped tokens / tokens of a micro-batch, averaged over
    micro-batches. Scalar float32.

    A token is clipped when its trust region stopped it: `clipped` is not 0. The official code
    leaves out those beyond the cap for A < 0; `summarize` counts each kind.
    """
    outs = cast("list[PolicyLoss]", [out] if hasattr(out, "clipped") else list(out))
    if not outs:
        raise ValueError("token_clipping_ratio needs at least one micro-batch")
    columns = torch.stack([o.summary for o in outs], -1).to(torch.float32)
    numbers = dict(zip(Summary._fields, columns, strict=True))
    clipped = torch.stack([numbers[f"clip_{side}"] for side in CLIPPED[1:]]).sum(0)
    return (clipped / numbers["tokens"].clamp(min=1)).mean()


def response_utilization_ratio(advantages: Tensor) -> Tensor:
    """RUR (DCPO section 4.1): responses with a non-zero advantage / responses. advantages: [R].
    Scalar float32."""
    if advantages.dim() != 1 or len(advantages) == 0:
        raise ValueError(
            f"advantages must be [R], one per response, at least one; got shape "
            f"{list(advantages.shape)}"
        )
    return (advantages != 0).float().mean()


def summarize(out: PolicyLoss) -> dict[str, float]:
    """The usual numbers of one loss as floats; waits for the GPU once.

    tokens: those that count; tokens_read: of these, the ones whose logits were read, fewer with
    skip_zero_advantage; tokens_dropped: by drop_nonfinite. *_mean, ratio_min, ratio_max, approx_kl:
    over tokens that were read. approx_kl: mean of (r - 1) - log r, an estimate of KL(old || new)
    (Schulman's k3). clip_*: share of the tokens that count, by the side that clipped them;
    token_clipping_ratio is their sum.
    """
    n = Summary(*out.summary.tolist())
    read, tokens = max(n.tokens_read, 1), max(n.tokens, 1)
    sides = {f"clip_{side}": getattr(n, f"clip_{side}") / tokens for side in CLIPPED[1:]}
    numbers = {
        "loss": n.loss,
        "tokens": n.tokens,
        "tokens_read": n.tokens_read,
        "tokens_dropped": n.tokens_dropped,
        "responses": float(len(out.response_loss)),
        "logprob_mean": n.logprob_sum / read,
        "ratio_mean": n.ratio_sum / read,
        "ratio_min": n.ratio_min,
        "ratio_max": n.ratio_max,
        "approx_kl": n.kl_sum / read,
        "token_clipping_ratio": sum(sides.values()),
        **sides,
    }
    if out.entropy is not None:
        numbers["entropy_mean"] = n.entropy_sum / read
    return numbers
