"""What a step learns from: sampled responses, their advantages, and the old log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.advantages import SmoothAdvantage, group_advantage
from dcpo_kernels.train.batch import collate
from dcpo_kernels.train.clock import Clock
from dcpo_kernels.train.config import TrainConfig
from dcpo_kernels.train.data import Problem, ProblemOrder
from dcpo_kernels.train.policy import Policy
from dcpo_kernels.train.rewards import score
from dcpo_kernels.train.rollout import Rollout, decode, encode, end_ids, generate


class Experience(NamedTuple):
    """Groups of group_size responses, one group after the other."""

    rollout: Rollout
    advantages: Tensor  # [R]
    old_logprobs: list[Tensor]  # of each response's tokens
    entropy: float  # of the policy that sampled, nats per token
    rewards: Tensor  # of all that was sampled, groups that dynamic sampling dropped included


class Sampler:
    """Samples responses and prepares what a step learns from; keeps the state of sampling."""

    def __init__(
        self, policy: Policy, tokenizer: Any, problems: Sequence[Problem], config: TrainConfig
    ) -> None:
        self.policy, self.tokenizer, self.config = policy, tokenizer, config
        self.model = model = policy.model
        self.order = ProblemOrder(problems, config.prompts_per_step, config.seed)
        self.smooth = SmoothAdvantage()
        self.generator = torch.Generator(model.device).manual_seed(config.seed)
        self.end = end_ids(model, tokenizer)

    def collect(self, clock: Clock) -> Experience:
        """Responses to the next problems."""
        size = self.config.group_size
        rollout, problems, rewards, sampled = self._groups(clock)
        if self.config.advantage == "smooth":
            advantages = self.smooth(rewards, [p.index for p in problems for _ in range(size)])
        else:
            advantages = group_advantage(rewards, torch.arange(len(rewards)) // size)
        with clock("old_logprobs"):
            old_logprobs, entropy = self.logprobs(rollout)
        return Experience(rollout, advantages, old_logprobs, entropy, sampled)

    def _groups(self, clock: Clock) -> tuple[Rollout, list[Problem], Tensor, Tensor]:
        """The groups to learn from, their problems and rewards [R]; the rewards of all groups."""
        config = self.config
        kept, problems, rewards, sampled = Rollout([], [], []), [], [], []
        rounds = config.sampling_rounds if config.dynamic_sampling else 1
        for left in reversed(range(rounds)):
            asked, answers, scores = self._answers(clock)
            sampled.append(scores)
            groups = list(range(len(asked)))
            if config.dynamic_sampling and (problems or left):
                # A group of equal rewards teaches nothing (DAPO section 3.2). Only where no round
                # has brought another is the last one kept as it is.
                groups = [g for g in groups if scores[g].min() < scores[g].max()]
                groups = groups[: config.prompts_per_step - len(problems)]
            rows = torch.arange(len(answers)).view(len(asked), -1)[groups].flatten().tolist()
            kept += answers.select(rows)
            problems += [asked[g] for g in groups]
            rewards.append(scores[groups])
            if len(problems) == config.prompts_per_step:
                break
        return kept, problems, torch.cat(rewards).flatten(), torch.cat(sampled).flatten()

    def _answers(self, clock: Clock) -> tuple[list[Problem], Rollout, Tensor]:
        """The next problems, group_size responses to each, and their rewards [problems, group]."""
        config = self.config
        problems = self.order.take()
        with clock("rollout"):
            rollout = generate(
                self.model,
                encode(self.tokenizer, problems),
                group_size=config.group_size,
                max_new_tokens=config.max_new_tokens,
                end=self.end,
                temperature=config.temperature,
                generator=self.generator,
            )
        with clock("rewards"):
            texts = decode(self.tokenizer, rollout.responses)
            truths = [p.ground_truth for p in problems for _ in range(config.group_size)]
            scores = torch.tensor(score(texts, truths))
        return problems, rollout, scores.view(len(problems), -1)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> tuple[list[Tensor], float]:
        """Log-probs of the responses under the policy as it is now, and its mean entropy."""
        result: list[Tensor] = []
        total = 0.0
        size = self.config.micro_batch_size
        for start in range(0, len(rollout), size):
            part = rollout.select(range(start, min(start + size, len(rollout))))
            batch = collate(part.prompts, part.responses, self.model.device)
            logprobs, entropy = self.policy.logprobs(
                self.policy.run(batch),
                batch,
                temperature=self.config.temperature,
                with_entropy=True,
            )
            assert entropy is not None
            total += float(entropy.sum())
            result += logprobs.split(batch.lengths.tolist())
        return result, total / sum(map(len, result))

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.order.taken,
            "smooth": self.smooth.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.taken = state["taken"]
        self.smooth.load_state_dict(state["smooth"])
        self.generator.set_state(state["generator"])
