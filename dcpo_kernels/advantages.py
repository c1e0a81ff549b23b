"""Advantages from rewards: smooth standardization over a prompt's whole history (DCPO), and over
one group (GRPO)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PromptStatistics(NamedTuple):
    """Rewards of one prompt so far."""

    visits: int  # steps in which it was answered
    count: int  # responses
    mean: float
    std: float


def _group(
    ids: Sequence[Hashable] | Tensor, rewards: Tensor, name: str
) -> tuple[list[Hashable], Tensor]:
    """The distinct ids in order of appearance, and for each reward the position of its own."""
    keys: Sequence[Hashable] = ids.tolist() if isinstance(ids, Tensor) else ids
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [R], one a response, got shape {list(rewards.shape)}")
    if len(keys) != len(rewards):
        raise ValueError(
            f"{name} must name one id a reward: got {len(keys)} ids for {len(rewards)} rewards"
        )
    position: dict[Hashable, int] = {}
    codes = torch.tensor(
        [position.setdefault(key, len(position)) for key in keys], dtype=torch.int64
    )
    groups = list(position)
    broken = ~torch.isfinite(rewards)
    if broken.any():
        at = int(broken.nonzero()[0])
        raise ValueError(
            f"rewards[{at}] is {float(rewards[at])}, of {name[:-1]} {keys[at]!r}: rewards must be "
            f"finite"
        )
    return groups, codes


def _moments(
    rewards: Tensor, codes: Tensor, groups: int, ddof: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of each group. Equal rewards have a spread of exactly 0 and their
    own value as mean."""
    count = torch.bincount(codes, minlength=groups)
    mean = torch.zeros(groups, dtype=torch.float64).index_add_(0, codes, rewards) / count
    squares = torch.zeros(groups, dtype=torch.float64).index_add_(
        0, codes, (rewards - mean[codes]) ** 2
    )
    least = torch.full((groups,), torch.inf, dtype=torch.float64).scatter_reduce_(
        0, codes, rewards, "amin"
    )
    most = torch.full((groups,), -torch.inf, dtype=torch.float64).scatter_reduce_(
        0, codes, rewards, "amax"
    )
    equal = least == most
    variance = torch.where(equal, 0.0, squares / (count - ddof))
    return count, torch.where(equal, least, mean), variance


def _standardize(rewards: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(R - mean) / std, 0 where the spread is 0. No epsilon."""
    return torch.where(variance > 0, (rewards - mean) / variance.sqrt(), 0.0)


def group_advantage(
    rewards: Tensor | Sequence[float],
    group_ids: Sequence[Hashable] | Tensor,
    normalize: bool = True,
    ddof: int = 0,
) -> Tensor:
    """Rewards standardized within their group (GRPO, arXiv 2402.03300, section 4.1.2), 0 where all
    are equal.

    rewards: [R] finite. group_ids: [R], any hashable. normalize=False only subtracts the mean (Dr.
        GRPO).
    ddof: 0 divides the squares by n, as the papers define the spread; 1 by n - 1, as TRL and verl
        compute it.

    Returns [R] float32 on the device of rewards.
    """
    given = torch.as_tensor(rewards)
    values = given.detach().to("cpu", torch.float64)
    groups, codes = _group(group_ids, values, "group_ids")
    _, mean, variance = _moments(values, codes, len(groups), ddof)
    centred = values - mean[codes]
    out = _standardize(values, mean[codes], variance[codes]) if normalize else centred
    return out.to(given.device, torch.float32)


class SmoothAdvantage:
    """Smooth advantage standardization (SAS, DCPO arXiv 2509.02333, eq. 7): rewards against all
    visits to a prompt.

    Each call is one visit of every prompt in it; the history includes the call. Of the two blends
    of the standardized rewards of this step and of all steps, the one nearer to 0 is taken, so that
    neither a change of prompts' luck nor a long history swings the advantage. A group of equal
    rewards still learns from its history.

        sas = SmoothAdvantage()
        advantages = sas(rewards, prompt_ids)  # [R], [R] -> [R] float32

    ddof: 0 for the paper's spread, 1 for the official repository's (torch.std), which it also
        merges as it is.
    """

    def __init__(self, ddof: int = 0) -> None:
        if ddof not in (0, 1):
            raise ValueError(f"ddof={ddof!r} must be 0 or 1")
        self.ddof = ddof
        self._row: dict[Hashable, int] = {}
        self._visits = torch.zeros(0, dtype=torch.int64)
        self._count = torch.zeros(0, dtype=torch.int64)
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._variance = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        """Prompts visited so far."""
        return len(self._row)

    def __call__(
        self, rewards: Tensor | Sequence[float], prompt_ids: Sequence[Hashable] | Tensor
    ) -> Tensor:
        """Advantages [R] float32 of rewards [R], and one more visit for each prompt in prompt_ids
        [R].

        Raises ValueError, with nothing counted, for a reward that is not finite, ids that don't
        match the rewards, and with ddof=1 for a prompt with a single response.
        """
        given = torch.as_tensor(rewards)
        values = given.detach().to("cpu", torch.float64)
        prompts, codes = _group(prompt_ids, values, "prompt_ids")
        n, mean_n, var_n = _moments(values, codes, len(prompts), self.ddof)
        if self.ddof and len(n) and int(n.min()) < 2:
            single = prompts[int((n < 2).nonzero()[0])]
            raise ValueError(
                f"prompt {single!r} has one response: its spread needs two with ddof=1"
            )

        rows = self._rows_of(prompts)
        o, mean_o, var_o = self._count[rows], self._mean[rows], self._variance[rows]
        w_o = o.double() / (o + n)
        w_n = 1 - w_o
        # Where nothing ever differed the mean is that value itself, not its rounded blend: 0.1
        # sixteen times, twice.
        same = (mean_n == mean_o) | (o == 0)
        mean_t = torch.where(same, mean_n, w_o * mean_o + w_n * mean_n)
        var_t = (
            w_o * var_o + w_n * var_n + torch.where(same, 0.0, w_o * w_n * (mean_n - mean_o) ** 2)
        )
        visits = self._visits[rows] + 1
        self._visits[rows], self._count[rows] = visits, o + n
        self._mean[rows], self._variance[rows] = mean_t, var_t

        a_n = _standardize(values, mean_n[codes], var_n[codes])
        a_t = _standardize(values, mean_t[codes], var_t[codes])
        new = (1 / visits.double())[codes]
        s1 = new * a_t + (1 - new) * a_n
        s2 = new * a_n + (1 - new) * a_t
        return torch.where(s1.abs() < s2.abs(), s1, s2).to(given.device, torch.float32)

    def _rows_of(self, prompts: list[Hashable]) -> Tensor:
        rows = [self._row.setdefault(prompt, len(self._row)) for prompt in prompts]
        missing = len(self._row) - len(self._visits)
        if missing > 0:
            room = torch.zeros(
                max(missing, len(self._visits))
            )  # doubles, so that growth costs O(1) a prompt
            self._visits = torch.cat([self._visits, room.to(torch.int64)])
            self._count = torch.cat([self._count, room.to(torch.int64)])
            self._mean = torch.cat([self._mean, room.to(torch.float64)])
            self._variance = torch.cat([self._variance, room.to(torch.float64)])
        return torch.tensor(rows, dtype=torch.int64)

    def statistics(self, prompt_id: Hashable) -> PromptStatistics:
        """What is remembered of a prompt. KeyError if it was never visited."""
        row = self._row[prompt_id]
        return PromptStatistics(
            int(self._visits[row]),
            int(self._count[row]),
            float(self._mean[row]),
            float(self._variance[row]) ** 0.5,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: plain lists and tensors, which torch.load reads with
        weights_only=True."""
        used = len(self._row)
        return {
            "ddof": self.ddof,
            "prompt_ids": list(self._row),
            "visits": self._visits[:used].clone(),
            "count": self._count[:used].clone(),
            "mean": self._mean[:used].clone(),
            "variance": self._variance[:used].clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; refused, with nothing changed, if it is not whole or was kept with
        another ddof."""
        wanted = ("ddof", "prompt_ids", "visits", "count", "mean", "variance")
        missing = [key for key in wanted if key not in state]
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}")
        if state["ddof"] != self.ddof:
            raise ValueError(
                f"the state was kept with ddof={state['ddof']}, this object has ddof={self.ddof}"
            )
        prompts = list(state["prompt_ids"])
        sizes = {key: len(state[key]) for key in wanted[1:]}
        if len(set(sizes.values())) != 1 or len(set(prompts)) != len(prompts):
            raise ValueError(
                f"the state does not hold one entry a prompt: {sizes}, {len(set(prompts))} "
                f"distinct ids"
            )
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._visits = torch.as_tensor(state["visits"]).to(torch.int64, copy=True)
        self._count = torch.as_tensor(state["count"]).to(torch.int64, copy=True)
        self._mean = torch.as_tensor(state["mean"]).to(torch.float64, copy=True)
        self._variance = torch.as_tensor(state["variance"]).to(torch.float64, copy=True)
