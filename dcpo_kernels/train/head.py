"""What a model makes its logits of, where that is a linear projection, a scale and a soft cap: then
the loss can start from hidden states, and no logits of a whole micro-batch exist."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.train.batch import collate, response_logits, response_states


class Head(NamedTuple):
    """The arguments of `linear_policy_loss` that say it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def logits(self, states: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(states, self.weight, self.bias) * self.logit_scale
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def head_of(model: Any) -> Head | None:
    """None for a model that does something else: its logits are compared."""
    layer, config = model.get_output_embeddings(), model.config
    weight = getattr(layer, "weight", None)
    if weight is None:
        return None
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 0) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    head = Head(weight, getattr(layer, "bias", None), float(scale), cap)
    batch = collate([[0, 1]], [[1, 0]], model.device)
    made, wanted = head.logits(response_states(model, batch)), response_logits(model, batch)
    rounding = 8 * torch.finfo(wanted.dtype).eps
    same = made.shape == wanted.shape and torch.allclose(
        made.float(), wanted.float(), rtol=rounding, atol=rounding * float(wanted.abs().max())
    )
    return head if same else None
