"""A training step: sample once, then several minibatch updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dcpo_kernels.metrics import response_utilization_ratio, summarize
from dcpo_kernels.objective import CLIPPED
from dcpo_kernels.train.batch import collate
from dcpo_kernels.train.clock import PHASES, Clock
from dcpo_kernels.train.config import TrainConfig
from dcpo_kernels.train.data import Problem
from dcpo_kernels.train.experience import Experience, Sampler
from dcpo_kernels.train.policy import Policy
from dcpo_kernels.train.rewards import RIGHT, UNFORMATTED

Metrics = dict[str, float]


class Trainer:
    """A model, its problems, and everything that changes from step to step."""

    def __init__(
        self, model: Any, tokenizer: Any, problems: Sequence[Problem], config: TrainConfig
    ) -> None:
        self.model = model.eval()  # dropout would move the ratio away from 1 before any update
        self.tokenizer = tokenizer
        self.config = config
        self.policy = Policy.of(model, config.loss_from)
        self.sampler = Sampler(self.policy, tokenizer, problems, config)
        lr, decay = config.learning_rate, config.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=True)
        self.steps = 0
        self.last: Experience | None = None

    def step(self) -> Metrics:
        config, clock = self.config, Clock(self.model.device)
        with clock("step"):
            experience = self.last = self.sampler.collect(clock)
            groups = torch.arange(len(experience.rollout)).view(-1, config.group_size)
            summaries: list[Metrics] = []
            norms: list[float] = []
            for part in groups.tensor_split(min(config.minibatches, len(groups))):
                rows = part.flatten().tolist()
                summaries += self.accumulate(experience, rows, clock)
                norms.append(self.update(len(rows), clock))
        self.steps += 1
        return {
            "step": self.steps,
            **_measured(experience, summaries),
            "loss": sum(s["loss"] for s in summaries) / len(norms),
            "grad_norm": sum(norms) / len(norms),
            **_timed(experience, clock.seconds),
        }

    def accumulate(
        self, experience: Experience, rows: Sequence[int], clock: Clock
    ) -> list[Metrics]:
        """Adds a minibatch's gradient to that of the parameters, micro-batch by micro-batch.

        The normalizers are those of the minibatch, so it does not matter how it is split.
        """
        config, device = self.config, self.model.device
        lengths = {i: len(experience.rollout.responses[i]) for i in rows}
        rows = sorted(rows, key=lambda i: (lengths[i], i))  # like lengths together: less padding
        summaries = []
        for start in range(0, len(rows), config.micro_batch_size):
            part = rows[start : start + config.micro_batch_size]
            chosen = experience.rollout.select(part)
            batch = collate(chosen.prompts, chosen.responses, device)
            advantages = experience.advantages[part].to(device)
            with clock("forward"):
                made = self.policy.run(batch)
            with clock("loss"):
                out = self.policy.loss(
                    made,
                    batch,
                    torch.cat([experience.old_logprobs[i] for i in part]),
                    advantages,
                    lengths=batch.lengths,
                    objective=config.objective,
                    temperature=config.temperature,
                    num_responses=len(rows),
                    num_tokens=sum(lengths.values()),
                    max_length=config.max_new_tokens,
                    skip_zero_advantage=True,
                )
            with clock("backward"):
                out.loss.backward()
            read = int(batch.lengths[advantages != 0].sum())
            summaries.append({**summarize(out), "tokens_read": read})
        return summaries

    def update(self, responses: int, clock: Clock) -> float:
        """An optimizer step on what `accumulate` left; returns the norm of the gradient."""
        limit = self.config.max_grad_norm
        if self.config.objective.aggregation == "only-token-mean":
            # OTM (DCPO eq. 8) sums over responses where the others average: so one limit serves all
            limit *= responses
        with clock("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """All but the model's weights."""
        return {
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])


def _measured(experience: Experience, summaries: Sequence[Metrics]) -> Metrics:
    rewards, rollout = experience.rewards, experience.rollout
    used = response_utilization_ratio(experience.advantages) * len(rollout)
    gap = torch.cat(rollout.logprobs) - torch.cat(experience.old_logprobs).cpu()
    # Rows of advantage 0 are not read and their ratio is not known: approx_kl leaves them out.
    divergence = sum(s["approx_kl"] * s["tokens"] for s in summaries)
    read = sum(s["tokens_read"] for s in summaries)

    def mean(key: str) -> float:  # over micro-batches (DCPO section 4.1)
        return sum(s[key] for s in summaries) / len(summaries)

    return {
        "reward": float(rewards.mean()),
        "accuracy": float((rewards == RIGHT).float().mean()),
        "unformatted": float((rewards == UNFORMATTED).float().mean()),
        "responses": len(rewards),
        "response_length": sum(map(len, rollout.responses)) / len(rollout),
        "rur": float(used) / len(rewards),  # what dynamic sampling dropped was not used either
        "tcr": mean("token_clipping_ratio"),
        **{f"clip_{side}": mean(f"clip_{side}") for side in CLIPPED[1:]},
        "entropy": experience.entropy,
        "approx_kl": divergence / max(read, 1),
        "ratio_min": min(s["ratio_min"] for s in summaries),
        "ratio_max": max(s["ratio_max"] for s in summaries),
        # As sampled with the KV cache, and as recomputed: more than rounding is a bug.
        "rollout_gap": float(gap.abs().max()),
    }


def _timed(experience: Experience, seconds: Mapping[str, float]) -> Metrics:
    tokens = sum(map(len, experience.rollout.responses))
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds["step"],
        **{f"seconds_{phase}": seconds[phase] for phase in (*PHASES, "step")},
    }
