"""Avg@k: the share of right answers among k samples of every problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dcpo_kernels.train.data import Problem
from dcpo_kernels.train.rewards import RIGHT, UNFORMATTED, score
from dcpo_kernels.train.rollout import decode, encode, end_ids, generate


class Evaluation(NamedTuple):
    accuracy: float  # Avg@k
    error: float  # standard error of accuracy, from the spread over problems
    unformatted: float  # share of responses without a final \boxed{}
    response_length: float  # tokens


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 1024,
    batch_size: int = 512,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answers every problem `samples` times (k of Avg@k).

    temperature: 0 takes the likeliest token, and then one sample says all.
    batch_size: responses at a time.
    seed: the same random numbers whatever was trained, and none of the trainer's.
    advance: told of problems done.
    """
    if samples < 1 or (temperature == 0 and samples != 1):
        raise ValueError(f"samples={samples} must be >= 1, and 1 at temperature 0")
    if not problems:
        raise ValueError("there are no problems to evaluate")
    generator = torch.Generator(model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    rewards: list[float] = []
    tokens = 0
    many = max(1, batch_size // samples)
    for start in range(0, len(problems), many):
        part = problems[start : start + many]
        rollout = generate(
            model,
            encode(tokenizer, part),
            group_size=samples,
            max_new_tokens=max_new_tokens,
            end=end_ids(model, tokenizer),
            temperature=temperature,
            generator=generator,
        )
        tokens += sum(map(len, rollout.responses))
        truths = [p.ground_truth for p in part for _ in range(samples)]
        rewards += score(decode(tokenizer, rollout.responses), truths)
        if advance:
            advance(len(part))
    model.train(was_training)
    scores = torch.tensor(rewards).view(len(problems), samples)
    right = (scores == RIGHT).double().mean(1)
    return Evaluation(
        float(right.mean()),
        float(right.std(correction=0)) / len(problems) ** 0.5,
        float((scores == UNFORMATTED).double().mean()),
        tokens / scores.numel(),
    )
