"""The configuration of a run: a frozen dataclass, and ready-made ones by method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dcpo_kernels.objective import Objective
from dcpo_kernels.presets import dapo, dcpo, dppo, grpo, gspo

ADVANTAGES = ("smooth", "group")
LOSS_FROM = ("auto", "hidden", "logits")


@dataclass(frozen=True)
class TrainConfig:
    """Everything `Trainer` needs beside a model, its tokenizer and problems.

    advantage: "smooth" standardizes against all visits of a problem (SAS, DCPO), "group" within the
        group (GRPO).
    dynamic_sampling: drop groups of equal rewards and sample on until prompts_per_step groups are
        left (DAPO), at most sampling_rounds times.
    minibatches: optimizer steps per rollout. With one, every ratio is 1 and nothing ever clips.
    micro_batch_size: responses in one forward pass. Changes memory and time, not the result.
    loss_from: what the loss starts from. "hidden": hidden states and the weight of the vocabulary
        projection, so that logits exist a chunk at a time and rows without a gradient cost no
        product; "logits": those of a micro-batch; "auto": hidden states where the model's logits
        are a projection of them, a scale and a soft cap.
    temperature: of the rollouts, and of the policy in the loss: both are one distribution.
    """

    objective: Objective
    advantage: str = "group"
    dynamic_sampling: bool = False
    sampling_rounds: int = 4
    prompts_per_step: int = 32
    group_size: int = 8
    minibatches: int = 4
    micro_batch_size: int = 64
    max_new_tokens: int = 1024
    loss_from: str = "auto"
    temperature: float = 1.0
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"objective must be an Objective such as dcpo(), got {self.objective!r}"
            )
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"advantage={self.advantage!r} is not one of {', '.join(ADVANTAGES)}")
        if self.loss_from not in LOSS_FROM:
            raise ValueError(f"loss_from={self.loss_from!r} is not one of {', '.join(LOSS_FROM)}")
        for field, least in (
            ("sampling_rounds", 1),
            ("prompts_per_step", 1),
            ("group_size", 2),  # a group of one has no spread: every advantage would be 0
            ("minibatches", 1),
            ("micro_batch_size", 1),
            ("max_new_tokens", 1),
            ("seed", 0),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field}={value!r} must be an integer >= {least}")
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} is not a multiple of "
                f"minibatches={self.minibatches}"
            )
        for field in ("temperature", "learning_rate", "max_grad_norm"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise ValueError(f"{field}={getattr(self, field)!r} must be finite and > 0")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay={self.weight_decay!r} must be finite and >= 0")
        o = self.objective
        if o.kl_coef != 0:
            raise ValueError(
                f"{o.name}: kl_coef={o.kl_coef} needs a reference model, which this loop lacks"
            )
        if o.beyond_target:
            raise ValueError(
                f"{o.name}: {o.beyond_target} needs more of the old policy than this "
                "loop keeps, the sampled tokens' log-probs; binary_tv and binary_kl work"
            )


def recipes(**common: Any) -> dict[str, TrainConfig]:
    """A ready-made config by method; all share the `common` fields (sizes, learning rate, seed)."""
    return {
        "dcpo": TrainConfig(objective=dcpo(), advantage="smooth", **common),
        "grpo": TrainConfig(objective=grpo(), **common),
        "dapo": TrainConfig(objective=dapo(), dynamic_sampling=True, **common),
        "gspo": TrainConfig(objective=gspo(), **common),
        "dppo": TrainConfig(objective=dppo(), **common),
    }
