"""row_gradient, row_gradient_: the write alone, from what row_stats returned and two coefficients a
row."""

from __future__ import annotations

import torch

from dcpo_kernels import backends
from dcpo_kernels.ops.library import define

# dx_j = 1/T [g (1[j = y] - p_j) - h p_j (log p_j + H)]; a row with g = h = 0 is not read.
# h None: no entropy term, and entropy may be of size 0.
_ARGUMENTS = (
    "Tensor target_ids, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor g, Tensor? h, float "
    "temperature, "
    "str backend"
)


def _run(logits, gradient, target_ids, row_max, log_sum, entropy, g, h, temperature, backend):
    if logits.numel():
        backends.kernels(backend, logits.device.type).row_gradient(
            logits, gradient, target_ids, row_max, log_sum, entropy, g, h, temperature
        )


def _launch(logits, *rest):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(logits, gradient, *rest)
    return gradient


def _fake(logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _launch_in_place(logits, *rest):
    _run(logits, logits, *rest)


def _fake_in_place(logits, *rest):
    pass


row_gradient = define(f"row_gradient(Tensor logits, {_ARGUMENTS}) -> Tensor", _launch, _fake)
row_gradient_ = define(
    f"row_gradient_(Tensor(a!) logits, {_ARGUMENTS}) -> ()", _launch_in_place, _fake_in_place
)
