"""fused, fused_: read, decide, write. Each row of logits is read once and its gradient written
once."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.backends.layout import row_count
from dcpo_kernels.ops.library import check_ids, define

# N = rows of logits; tensors of N contiguous, which policy_loss sees to and nothing here checks.
# weights 0: the row is not read, its results are 0 and its ratio 1.
_ARGUMENTS = (
    "Tensor target_ids, "  # [N] int64
    "Tensor old_logprobs, Tensor advantages, Tensor weights, "  # [N] float32
    "Tensor? ref_logprobs, Tensor? importance_weights, "  # [N] float32
    "Tensor? topk_ids, Tensor? topk_logprobs, "  # [N, K] int64, float32
    "Tensor? old_logits, "  # like logits
    # objectives.kernel_arguments
    "int surrogate, int divergence, float eps_low, float eps_high, float ratio_max, float "
    "ratio_cap, "
    "float limit_low, float limit_high, float kl_coef, float entropy_coef, float penalty_coef, "
    "float temperature, bool with_entropy, bool skip_zero_advantage, "
)
# [N] float32, entropy [0] unless asked for (or needed by the objective); clipped int8
_RESULTS = "Tensor token_loss, Tensor logprobs, Tensor entropy, Tensor ratio, Tensor clipped"


def _results(
    logits: Tensor, weights: Tensor, entropy_coef: float, with_entropy: bool
) -> tuple[Tensor, ...]:
    rows = row_count(logits)
    return (
        weights.new_empty(rows),
        weights.new_empty(rows),
        weights.new_empty(rows if with_entropy or entropy_coef != 0 else 0),
        weights.new_empty(rows),
        weights.new_empty(rows, dtype=torch.int8),
    )


def _run(logits, gradient, target_ids, old_logprobs, advantages, weights, *rest):
    (
        ref_logprobs,
        importance_weights,
        topk_ids,
        topk_logprobs,
        old_logits,
        *objective,
        temperature,
        with_entropy,
        skip_zero_advantage,
        backend,
    ) = rest
    check_ids(target_ids, weights, logits.shape[-1], "target_ids")
    if topk_ids is not None:
        check_ids(topk_ids, weights, logits.shape[-1], "topk_ids")
    out = _results(logits, weights, objective[-2], with_entropy)
    if logits.numel():
        backends.kernels(backend, logits.device.type).fused(
            logits,
            gradient,
            target_ids,
            old_logprobs,
            advantages,
            weights,
            ref_logprobs,
            importance_weights,
            topk_ids,
            topk_logprobs,
            old_logits,
            objective,
            temperature,
            skip_zero_advantage,
            *out,
        )
    return out


def _launch(logits, *rest):
    *arguments, with_gradient, backend = rest
    gradient = torch.empty(
        logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device
    )
    out = _run(logits, gradient if with_gradient else None, *arguments, backend)
    return *out, gradient


def _fake(logits, *rest):
    weights, entropy_coef, with_entropy, with_gradient = rest[3], rest[-7], rest[-4], rest[-2]
    gradient = torch.empty(
        logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device
    )
    return *_results(logits, weights, entropy_coef, with_entropy), gradient


def _launch_in_place(logits, *rest):
    return _run(logits, logits, *rest)


def _fake_in_place(logits, *rest):
    weights, entropy_coef, with_entropy = rest[3], rest[-6], rest[-3]
    return _results(logits, weights, entropy_coef, with_entropy)


fused = define(
    f"fused(Tensor logits, {_ARGUMENTS} bool with_gradient, str backend) -> ({_RESULTS}, Tensor "
    f"gradient)",
    _launch,
    _fake,
)
fused_ = define(
    f"fused_(Tensor(a!) logits, {_ARGUMENTS} str backend) -> ({_RESULTS})",
    _launch_in_place,
    _fake_in_place,
)
