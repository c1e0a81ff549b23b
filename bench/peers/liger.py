"""liger-kernel's triton_grpo_loss: a whole loss in Triton, and the only peer that has one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.inputs import Inputs, response_count
from dcpo_kernels.bench.operators import Operator
from dcpo_kernels.bench.peers import Peer, read_read_write
from dcpo_kernels.bench.shapes import Case

# Our objectives by its loss_type and other arguments.
LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "ppo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
}


def lacks(operator: Operator, case: Case) -> str:
    if not operator.takes_objective:
        return "has a loss, no log-probs with a gradient"
    if case.objective not in LOSSES:
        return f"has no {case.objective}"
    if not case.masked and case.tokens % response_count(case.tokens):
        return "has no packed layout, and these tokens don't fill a rectangle"
    return ""


def rectangle(inputs: Inputs) -> Inputs:
    """Its only layout: responses of one length, padded. The rows of packed inputs are dealt out
    anew, so that it pays for no padding that others don't."""
    if inputs.mask is not None:
        return inputs
    shape = (len(inputs.advantages), -1)
    mask = torch.ones_like(inputs.target_ids, dtype=torch.bool).view(shape)
    return replace(
        inputs,
        logits=inputs.logits.view(*shape, inputs.case.vocab),
        target_ids=inputs.target_ids.view(shape),
        old_logprobs=inputs.old_logprobs.view(shape),
        upstream=inputs.upstream.view(shape),
        lengths=None,
        mask=mask,
        totals={**inputs.totals, "max_length": mask.shape[1]},
    )


def call(operator: Operator, inputs: Inputs) -> Call:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    inputs, objective = rectangle(inputs), inputs.objective
    arguments = {
        "old_logp": inputs.old_logprobs.contiguous(),
        "ref_logp": None,
        "completion_ids": inputs.target_ids.clamp(min=0),
        "advantages": inputs.advantages,
        "completion_mask": inputs.mask.float(),
        "temperature": 1.0,
        "beta": 0.0,
        "eps_low": objective.eps_low,
        "eps_high": objective.eps_high,
        "max_completion_length": inputs.totals["max_length"],
        "sapo_temperature_pos": objective.eps_high,
        "sapo_temperature_neg": objective.eps_low,
        "inplace": True,
        "reduce": True,
        **LOSSES[inputs.case.objective],
    }
    if inputs.case.objective == "ppo":
        arguments["delta"] = objective.ratio_cap
    if inputs.case.objective == "cispo":
        arguments["eps_high"] = objective.ratio_cap

    def run(logits: Tensor) -> Tensor:
        return triton_grpo_loss(logits, **arguments)[0]

    # The logits of the last position, which predict nothing, come along.
    logits = torch.cat([inputs.logits, inputs.logits[:, -1:]], 1)
    options = {"logits": logits, "rows": lambda gradient: gradient[:, :-1]}
    return Call(operator, inputs, run, overwrites=True, **options)


PEER = Peer(
    name="liger",
    distribution="liger-kernel",
    devices=("cuda",),
    lacks=lacks,
    call=call,
    note="responses of one length, in place",
    traffic=read_read_write,
)
