"""Losses of reinforcement learning with verifiable rewards, fused into one pass over the vocabulary
logits."""

from dcpo_kernels._version import __version__
from dcpo_kernels.advantages import SmoothAdvantage, group_advantage, overlong_punishment
from dcpo_kernels.context import ContextRows, context_rows
from dcpo_kernels.critic import gae, value_loss
from dcpo_kernels.function import TokenValues
from dcpo_kernels.linear import linear_policy_loss, linear_selected_logprobs
from dcpo_kernels.losses import (
    PolicyLoss,
    policy_loss,
    policy_loss_from_logprobs,
    selected_logprobs,
)
from dcpo_kernels.metrics import response_utilization_ratio, summarize, token_clipping_ratio
from dcpo_kernels.objective import Objective
from dcpo_kernels.parallel import (
    Normalizers,
    WholeResponses,
    global_normalizers,
    whole_responses,
)
from dcpo_kernels.presets import (
    bnpo,
    cispo,
    dapo,
    dcpo,
    dppo,
    dr_grpo,
    drpo,
    gmpo,
    grpo,
    gspo,
    icepop,
    inverse_sqrt,
    ipo,
    luspo,
    ppo,
    reinforce,
    sapo,
    spo,
    topr,
    up,
    vespo,
)
from dcpo_kernels.responses import token_weights
from dcpo_kernels.rollout import rollout_mask, rollout_weights

__all__ = [
    "ContextRows",
    "Normalizers",
    "Objective",
    "PolicyLoss",
    "SmoothAdvantage",
    "TokenValues",
    "WholeResponses",
    "__version__",
    "bnpo",
    "cispo",
    "context_rows",
    "dapo",
    "dcpo",
    "dppo",
    "dr_grpo",
    "drpo",
    "gae",
    "global_normalizers",
    "gmpo",
    "group_advantage",
    "grpo",
    "gspo",
    "icepop",
    "inverse_sqrt",
    "ipo",
    "linear_policy_loss",
    "linear_selected_logprobs",
    "luspo",
    "overlong_punishment",
    "policy_loss",
    "policy_loss_from_logprobs",
    "ppo",
    "reinforce",
    "response_utilization_ratio",
    "rollout_mask",
    "rollout_weights",
    "sapo",
    "selected_logprobs",
    "spo",
    "summarize",
    "token_clipping_ratio",
    "token_weights",
    "topr",
    "up",
    "value_loss",
    "vespo",
    "whole_responses",
]
