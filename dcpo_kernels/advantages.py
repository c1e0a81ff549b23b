"""Advantages from rewards: smooth standardization over a prompt's whole history (DCPO), and over
one group (GRPO)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PromptStatistics(NamedTuple):
    """Rewards of one prompt so far."""

    visits: int  # steps in which it was answered
    count: int  # responses
    mean: float
    std: float


class _History(NamedTuple):
    """What is kept of a prompt."""

    visits: float
    count: float
    mean: float
    variance: float


_NEVER = _History(0.0, 0.0, 0.0, 0.0)

# Types of ids that are kept as they are: they hash by value, and torch.load takes them.
_PLAIN = frozenset((str, int, bool, type(None)))


def _values(rewards: Tensor | Sequence[float]) -> tuple[Tensor, torch.device]:
    """Rewards in float64 on the CPU, and the device of the results; a list is taken in double
    precision."""
    if isinstance(rewards, Tensor):
        return rewards.detach().to("cpu", torch.float64), rewards.device
    values = torch.tensor(rewards, dtype=torch.float64, device="cpu")
    return values, torch.get_default_device()


def _id(x: Any) -> Hashable:
    """An id by its value. A tensor hashes by identity: each would be a prompt of its own."""
    if isinstance(x, tuple):
        return tuple(map(_id, x))
    if hasattr(x, "dtype") and hasattr(x, "item"):  # a scalar of torch or numpy
        if any(size != 1 for size in x.shape):
            raise TypeError(f"an id must be one value, got shape {list(x.shape)}")
        x = x.item()
    if isinstance(x, float) and x != x:
        raise ValueError("an id is NaN, which equals no id, not even itself")
    return x


def _ids(ids: Sequence[Hashable] | Tensor) -> list[Hashable]:
    keys = list(ids.tolist() if hasattr(ids, "tolist") else ids)  # pyright: ignore
    return keys if set(map(type, keys)) <= _PLAIN else list(map(_id, keys))


def _loadable(x: object) -> bool:
    """Whether torch.load(weights_only=True) takes an id back; it refuses b""."""
    if type(x) is tuple:
        return all(map(_loadable, x))
    return type(x) in _PLAIN or type(x) is float or (type(x) is bytes and x != b"")


def _check_loadable(ids: list[Hashable]) -> None:
    for x in ids:
        if not _loadable(x):
            raise TypeError(
                f"prompt id {x!r} is a {type(x).__name__}, which no saved state can hold: an id "
                "must be a string, a number, bytes or a tuple of them; str(id) is one"
            )


def _check_ddof(ddof: int) -> int:
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof!r} must be 0 or 1")
    return int(ddof)


def _group(
    ids: Sequence[Hashable] | Tensor, rewards: Tensor, name: str
) -> tuple[list[Hashable], Tensor]:
    """The distinct ids in order of appearance, and for each reward the position of its own."""
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [R], one per response, got {list(rewards.shape)}")
    keys = _ids(ids)
    if len(keys) != len(rewards):
        raise ValueError(
            f"{name} must name one id per reward: got {len(keys)} ids for {len(rewards)} rewards"
        )
    groups = list(dict.fromkeys(keys))
    position = dict(zip(groups, range(len(groups)), strict=True))
    codes = torch.tensor([position[key] for key in keys], dtype=torch.int64, device="cpu")
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
    zero = rewards.new_zeros(groups)
    mean = zero.index_add(0, codes, rewards) / count
    squares = zero.index_add(0, codes, (rewards - mean[codes]) ** 2)
    least = rewards.new_full((groups,), torch.inf).scatter_reduce_(0, codes, rewards, "amin")
    most = rewards.new_full((groups,), -torch.inf).scatter_reduce_(0, codes, rewards, "amax")
    equal = least == most
    variance = torch.where(equal, 0.0, squares / (count - ddof))
    return count, torch.where(equal, least, mean), variance


def _check_finite(mean: Tensor, variance: Tensor, groups: list[Hashable]) -> None:
    broken = ~(torch.isfinite(mean) & torch.isfinite(variance))
    if broken.any():
        group = groups[int(broken.nonzero()[0])]
        raise ValueError(f"the rewards of {group!r} are too large: their spread is not finite")


def _columns(histories: list[_History]) -> dict[str, Tensor]:
    """[prompts] float64 by field, on the CPU."""
    table = torch.tensor(histories, dtype=torch.float64, device="cpu").view(-1, len(_NEVER))
    return dict(zip(_History._fields, table.T.contiguous(), strict=True))


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

    rewards: [R] finite. group_ids: [R], any hashable; tensors and numpy scalars count by their
        value. normalize=False only subtracts the mean (Dr. GRPO).
    ddof: 0 divides the squares by n, as the papers define the spread; 1 by n - 1, as TRL and verl
        compute it.

    Returns [R] float32 on the device of rewards, for a list on torch's default device. Raises
    ValueError for a reward that is not finite and for ids that don't match the rewards.
    """
    _check_ddof(ddof)
    values, device = _values(rewards)
    groups, codes = _group(group_ids, values, "group_ids")
    _, mean, variance = _moments(values, codes, len(groups), ddof)
    _check_finite(mean, variance, groups)
    centred = values - mean[codes]
    out = _standardize(values, mean[codes], variance[codes]) if normalize else centred
    return out.to(device, torch.float32)


def overlong_punishment(lengths: Tensor | Sequence[int], max_length: int, cache: int) -> Tensor:
    """What DAPO adds to the reward of a long response (arXiv 2503.14476, eq. 13).

    0 up to max_length - cache tokens, linear to -1 at max_length, -1 beyond. lengths: [R] tokens of
    each response. Returns [R] float32.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache} must lie in 1..max_length={max_length}")
    n = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
    if not n.is_floating_point():
        n = n.to(torch.int64)  # unsigned ones would wrap below 0
    return ((max_length - cache - n) / cache).clamp(-1.0, 0.0).to(torch.float32)


class SmoothAdvantage:
    """Rewards standardized against all visits to a prompt (SAS, DCPO arXiv 2509.02333, eq. 7).

    Each call is one visit of every prompt in it; the history includes the call. Of the two blends
    of the standardized rewards of this step and of all steps, the one nearer to 0 is taken, so that
    neither a change of luck nor a long history swings the advantage. A group of equal rewards still
    learns from its history.

        sas = SmoothAdvantage()
        advantages = sas(rewards, prompt_ids)  # [R], [R] -> [R] float32

    A prompt id is a string, a number, bytes, or a tuple of them, so that torch.load reads a saved
    state with weights_only=True. Tensors and numpy scalars count by their value, and ids that are
    equal in Python are one prompt: 1 and 1.0.

    ddof: 0 for the paper's spread, 1 for the official repository's (torch.std), which it also
        merges as it is.
    max_prompts: at most so many are remembered; the least recently visited ones are forgotten.
    """

    def __init__(self, ddof: int = 0, max_prompts: int | None = None) -> None:
        if max_prompts is not None and not (
            isinstance(max_prompts, Integral) and int(max_prompts) >= 1
        ):
            raise ValueError(
                f"max_prompts={max_prompts!r} must be a whole number >= 1, or None for no bound"
            )
        self.ddof = _check_ddof(ddof)
        self.max_prompts = max_prompts
        self._seen: dict[Hashable, _History] = {}  # bounded: least recently visited first

    def __len__(self) -> int:
        """Prompts remembered."""
        return len(self._seen)

    def __call__(
        self, rewards: Tensor | Sequence[float], prompt_ids: Sequence[Hashable] | Tensor
    ) -> Tensor:
        """Advantages [R] float32 of rewards [R]: one more visit for each prompt in prompt_ids [R].

        They are on the device of rewards, for a list on torch's default device.

        Raises ValueError, with nothing counted, for a reward that is not finite, ids that don't
        match the rewards, and with ddof=1 for a prompt with a single response; TypeError for an id
        that a saved state could not hold.
        """
        values, device = _values(rewards)
        prompts, codes = _group(prompt_ids, values, "prompt_ids")
        _check_loadable(prompts)
        n, mean_n, var_n = _moments(values, codes, len(prompts), self.ddof)
        if self.ddof and len(n) and int(n.min()) < 2:
            single = prompts[int((n < 2).nonzero()[0])]
            raise ValueError(
                f"prompt {single!r} has one response: its spread needs two with ddof=1"
            )

        before = _columns([self._seen.get(prompt, _NEVER) for prompt in prompts])
        visits_o, o, mean_o, var_o = before.values()
        visits = visits_o + 1
        w_o = o / (o + n)
        w_n = 1 - w_o
        # Where nothing ever differed the mean is that value itself, not its rounded blend: 0.1
        # sixteen times, twice.
        same = (mean_n == mean_o) | (o == 0)
        between = torch.where(same, 0.0, w_o * w_n * (mean_n - mean_o) ** 2)
        mean_t = torch.where(same, mean_n, w_o * mean_o + w_n * mean_n)
        var_t = w_o * var_o + w_n * var_n + between
        _check_finite(mean_t, var_t, prompts)
        after = torch.stack([visits, o + n, mean_t, var_t], 1).tolist()
        self._remember((p, _History(*row)) for p, row in zip(prompts, after, strict=True))

        a_n = _standardize(values, mean_n[codes], var_n[codes])
        a_t = _standardize(values, mean_t[codes], var_t[codes])
        new = (1 / visits)[codes]
        s1 = new * a_t + (1 - new) * a_n
        s2 = new * a_n + (1 - new) * a_t
        return torch.where(s1.abs() < s2.abs(), s1, s2).to(device, torch.float32)

    def _remember(self, visited: Iterable[tuple[Hashable, _History]]) -> None:
        """Replaces what is known of these prompts, and forgets what exceeds max_prompts."""
        for prompt, history in visited:
            if self.max_prompts is not None:
                self._seen.pop(prompt, None)  # to the end of the dict, which keeps its order
            self._seen[prompt] = history
        excess = 0 if self.max_prompts is None else len(self._seen) - self.max_prompts
        for prompt in list(islice(self._seen, max(excess, 0))):
            del self._seen[prompt]

    def statistics(self, prompt_id: Hashable) -> PromptStatistics:
        """What is remembered of a prompt. KeyError if it is not."""
        seen = self._seen[_id(prompt_id)]
        return PromptStatistics(int(seen.visits), int(seen.count), seen.mean, seen.variance**0.5)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: an int, a list and tensors [prompts], float64, which
        torch.load reads with weights_only=True."""
        columns = _columns(list(self._seen.values()))
        return {"ddof": self.ddof, "prompt_ids": list(self._seen), **columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; refused, with nothing changed, if it is not whole or was kept with
        another ddof."""
        missing = [key for key in ("ddof", "prompt_ids", *_History._fields) if key not in state]
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}")
        if state["ddof"] != self.ddof:
            raise ValueError(
                f"the state was kept with ddof={state['ddof']}, this object has ddof={self.ddof}"
            )
        prompts = _ids(state["prompt_ids"])
        _check_loadable(prompts)
        if len(set(prompts)) != len(prompts):
            raise ValueError(
                f"the state does not hold one entry per prompt: of {len(prompts)} ids "
                f"{len(set(prompts))} are distinct"
            )
        columns: dict[str, Tensor] = {}
        for key, least in zip(_History._fields, (1, 1, -torch.inf, 0), strict=True):
            try:
                column = torch.as_tensor(state[key], dtype=torch.float64, device="cpu").detach()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{key} of the state holds no numbers: {error}") from error
            if column.shape != (len(prompts),):
                raise ValueError(
                    f"the state does not hold one entry per prompt: {len(prompts)} ids, {key} of "
                    f"shape {list(column.shape)}"
                )
            fine = torch.isfinite(column) & (column >= least)
            if key in ("visits", "count"):
                fine &= column == column.floor()
            if key == "count":  # each visit brought a response
                fine &= column >= columns["visits"]
            if not fine.all():
                at = int((~fine).nonzero()[0])
                raise ValueError(f"{key} of prompt {prompts[at]!r} is {float(column[at])}")
            columns[key] = column
        rows = map(_History, *(column.tolist() for column in columns.values()))
        self._seen = {}
        self._remember(zip(prompts, rows, strict=True))

    def merge(self, other: dict[str, Any], base: dict[str, Any] | None = None) -> None:
        """Take in the state of another rank, which visited other prompts.

        other: its state_dict(). base: the state_dict that both ranks began from, if any: a prompt
        that only one of them has visited since then is taken from that one.

        Raises ValueError, with nothing changed, naming a prompt that both have visited: its two
        histories can't be told apart, and adding them would count visits twice.
        """
        theirs = SmoothAdvantage(self.ddof)
        theirs.load_state_dict(other)
        start = SmoothAdvantage(self.ddof)
        if base is not None:
            start.load_state_dict(base)
        visited = [(p, seen) for p, seen in theirs._seen.items() if seen != start._seen.get(p)]
        for prompt, _ in visited:
            if prompt in self._seen and self._seen[prompt] != start._seen.get(prompt):
                raise ValueError(
                    f"prompt {prompt!r} was visited on both sides: its visits would count twice"
                )
        self._remember(visited)
