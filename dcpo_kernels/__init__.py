"""Losses of reinforcement learning with verifiable rewards, fused into one pass over the vocabulary
logits."""

from dcpo_kernels._version import __version__
from dcpo_kernels.advantages import SmoothAdvantage, group_advantage
from dcpo_kernels.aggregation import token_weights
from dcpo_kernels.losses import PolicyLoss, policy_loss, selected_logprobs
from dcpo_kernels.metrics import response_utilization_ratio, summarize, token_clipping_ratio
from dcpo_kernels.objectives import (
    Objective,
    cispo,
    dapo,
    dcpo,
    dppo,
    grpo,
    gspo,
    inverse_sqrt,
    ppo,
)

__all__ = [
    "Objective",
    "PolicyLoss",
    "SmoothAdvantage",
    "__version__",
    "cispo",
    "dapo",
    "dcpo",
    "dppo",
    "group_advantage",
    "grpo",
    "gspo",
    "inverse_sqrt",
    "policy_loss",
    "ppo",
    "response_utilization_ratio",
    "selected_logprobs",
    "summarize",
    "token_clipping_ratio",
    "token_weights",
]
