"""Losses of reinforcement learning with verifiable rewards, fused into one pass over the vocabulary
logits."""

from dcpo_kernels._version import __version__
from dcpo_kernels.advantages import SmoothAdvantage, group_advantage, overlong_punishment
from dcpo_kernels.critic import gae, value_loss
from dcpo_kernels.losses import (
    PolicyLoss,
    policy_loss,
    policy_loss_from_logprobs,
    selected_logprobs,
)
from dcpo_kernels.metrics import response_utilization_ratio, summarize, token_clipping_ratio
from dcpo_kernels.objective import Objective
from dcpo_kernels.presets import (
    bnpo,
    cispo,
    dapo,
    dcpo,
    dppo,
    dr_grpo,
    grpo,
    gspo,
    icepop,
    inverse_sqrt,
    ppo,
    sapo,
)
from dcpo_kernels.responses import token_weights

__all__ = [
    "Objective",
    "PolicyLoss",
    "SmoothAdvantage",
    "__version__",
    "bnpo",
    "cispo",
    "dapo",
    "dcpo",
    "dppo",
    "dr_grpo",
    "gae",
    "group_advantage",
    "grpo",
    "gspo",
    "icepop",
    "inverse_sqrt",
    "overlong_punishment",
    "policy_loss",
    "policy_loss_from_logprobs",
    "ppo",
    "response_utilization_ratio",
    "sapo",
    "selected_logprobs",
    "summarize",
    "token_clipping_ratio",
    "token_weights",
    "value_loss",
]
