"""What the loss of a step costs, vocabulary projection included: with our ops, and in plain
PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.bench import plain
from dcpo_kernels.losses import policy_loss
from dcpo_kernels.train.batch import collate
from dcpo_kernels.train.policy import Policy
from dcpo_kernels.train.step import Trainer


def loss_seconds(trainer: Trainer, repetitions: int = 5) -> dict[str, float]:
    """Seconds per response token from hidden states to the loss and its gradients in them and in
    the weight of the vocabulary projection.

    "ours" as the run calls it, "every_row" without leaving out rows of advantage 0, "logits" with
    our op on the logits of the whole micro-batch, "plain" in plain PyTorch. On a micro-batch of the
    last step; medians of repetitions that take turns.
    """
    experience, policy = trainer.last, trainer.policy
    if experience is None or policy.head is None:
        raise ValueError("the trainer has not made a step yet, or none from hidden states")
    config, rollout, head = trainer.config, experience.rollout, policy.head
    size = config.prompts_per_step * config.group_size // config.minibatches
    rows = range(min(size, config.micro_batch_size, len(rollout)))
    batch = collate(
        rollout.prompts[: len(rows)], rollout.responses[: len(rows)], trainer.model.device
    )
    with torch.no_grad():
        states = policy.run(batch)
    weight = head.weight.detach().requires_grad_()
    arguments: dict[str, Any] = {
        "lengths": batch.lengths,
        "objective": config.objective,
        "temperature": config.temperature,
        "num_responses": size,
        "num_tokens": int(batch.lengths.sum()),
        "max_length": config.max_new_tokens,
    }
    data = (torch.cat(experience.old_logprobs[: len(rows)]), experience.advantages[: len(rows)])
    skipping: dict[str, Any] = {**arguments, "skip_zero_advantage": True}
    rest = head._replace(weight=weight)

    def from_logits(x: Tensor) -> Tensor:
        logits = rest.logits(x)
        return policy_loss(logits, batch.target_ids, *data, **skipping, inplace=True).loss

    def plainly(x: Tensor) -> Tensor:
        return plain.policy_loss(batch.target_ids, *data, **arguments)(rest.logits(x))

    ours = Policy(trainer.model, head=rest)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: ours.loss(x, batch, *data, **skipping).loss,
        "every_row": lambda x: ours.loss(x, batch, *data, **arguments).loss,
        "logits": from_logits,
        "plain": plainly,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(repetitions + 1):
        for way, loss in ways.items():
            x = states.clone().requires_grad_()
            start = time.perf_counter()
            torch.autograd.grad(loss(x), (x, weight))
            if repetition:  # the first only warms up
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) / len(batch.target_ids) for way, times in seconds.items()}
