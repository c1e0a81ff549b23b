"""What the loss of a step costs: with our op, and in plain PyTorch on the same logits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.bench import plain
from dcpo_kernels.losses import policy_loss
from dcpo_kernels.train.batch import collate, response_logits
from dcpo_kernels.train.step import Trainer


def loss_seconds(trainer: Trainer, repetitions: int = 5) -> dict[str, float]:
    """Seconds per response token for the loss and its gradient in the logits.

    "ours" as the run calls it, "every_row" without leaving out rows of advantage 0, "plain" in
    plain PyTorch, which leaves out none. On a micro-batch of the last step; medians of repetitions
    that take turns.
    """
    experience = trainer.last
    if experience is None:
        raise ValueError("the trainer has not made a step yet")
    config, rollout = trainer.config, experience.rollout
    size = config.prompts_per_step * config.group_size // config.minibatches
    rows = range(min(size, config.micro_batch_size, len(rollout)))
    batch = collate(
        rollout.prompts[: len(rows)], rollout.responses[: len(rows)], trainer.model.device
    )
    with torch.no_grad():
        logits = response_logits(trainer.model, batch)
    arguments: dict[str, Any] = {
        "lengths": batch.lengths,
        "objective": config.objective,
        "temperature": config.temperature,
        "num_responses": size,
        "num_tokens": int(batch.lengths.sum()),
        "max_length": config.max_new_tokens,
    }
    data = (
        batch.target_ids,
        torch.cat(experience.old_logprobs[: len(rows)]),
        experience.advantages[: len(rows)],
    )
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: (
            policy_loss(x, *data, **arguments, inplace=True, skip_zero_advantage=True).loss
        ),
        "every_row": lambda x: policy_loss(x, *data, **arguments, inplace=True).loss,
        "plain": lambda x: plain.policy_loss(*data, **arguments)(x),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(repetitions + 1):
        for way, loss in ways.items():
            x = logits.requires_grad_().clone()  # in place it becomes its gradient
            start = time.perf_counter()
            torch.autograd.grad(loss(x), x)
            if repetition:  # the first only warms up
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) / len(batch.target_ids) for way, times in seconds.items()}
