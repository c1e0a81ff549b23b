"""Problems in parquet, in the format of the DCPO repository, checked before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dcpo_kernels.files import written_whole

COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")


class ProblemError(ValueError):
    """Names the file, the row and the field."""


class Problem(NamedTuple):
    index: int | str  # unique: what smooth advantages remember a problem by
    prompt: list[dict[str, str]]  # messages {role, content}
    ground_truth: str
    data_source: str = "unknown"
    ability: str = "math"
    style: str = "rule"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _text(struct: Any, key: str, inside: str = "") -> str:
    """struct[key], a string that is there and not blank; `inside` says where the struct stands."""
    field = f"{inside}.{key}" if inside else key
    if not isinstance(struct, dict):
        raise ProblemError(f"{inside} must be a struct with {key}, got {_kind(struct)}")
    if struct.get(key) is None:
        raise ProblemError(f"{field} is missing")
    if not isinstance(struct[key], str):
        raise ProblemError(f"{field} must be a string, got {_kind(struct[key])}")
    if not struct[key].strip():
        raise ProblemError(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in struct[key]):
        raise ProblemError(f"{field} holds half a surrogate pair: no Unicode text")
    return struct[key]


def _problem(row: dict[str, Any]) -> Problem:
    messages = row["prompt"]
    if not isinstance(messages, list):
        raise ProblemError(f"prompt must be a list of {{role, content}}, got {_kind(messages)}")
    if not messages:
        raise ProblemError("prompt is empty")
    prompt = [
        {key: _text(message, key, f"prompt[{i}]") for key in ("role", "content")}
        for i, message in enumerate(messages)
    ]
    ground_truth = _text(row["reward_model"], "ground_truth", "reward_model")
    style = _text(row["reward_model"], "style", "reward_model")
    info = row["extra_info"]
    if not isinstance(info, dict) or info.get("index") is None:
        raise ProblemError("extra_info.index is missing")
    index = info["index"]
    if not isinstance(index, (int, str)) or isinstance(index, bool):
        raise ProblemError(f"extra_info.index must be an integer or a string, got {_kind(index)}")
    if isinstance(index, int) and not -(2**63) <= index < 2**63:
        raise ProblemError(f"extra_info.index {index} does not fit in 64 bits")
    return Problem(
        index, prompt, ground_truth, _text(row, "data_source"), _text(row, "ability"), style
    )


def _check(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> list[Problem]:
    if not rows:
        raise ProblemError(f"{path}: no rows")
    problems: list[Problem] = []
    seen: dict[int | str, int] = {}
    for i, row in enumerate(rows):
        try:
            problem = _problem(row)
        except ProblemError as error:
            raise ProblemError(f"{path}: row {i}: {error}") from None
        if problem.index in seen:
            raise ProblemError(
                f"{path}: row {i}: extra_info.index {problem.index!r} is also that of row "
                f"{seen[problem.index]}; advantages remember a problem by it: it must be unique"
            )
        if problems and type(problem.index) is not type(problems[0].index):
            raise ProblemError(
                f"{path}: row {i}: extra_info.index is of type {_kind(problem.index)}, that of "
                f"row 0 {_kind(problems[0].index)}; a column has one type"
            )
        seen[problem.index] = i
        problems.append(problem)
    return problems


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """All problems of a file; a ProblemError names the file, the row (from 0) and the field."""
    try:
        table = pq.read_table(path)
        missing = [name for name in COLUMNS if name not in table.column_names]
        rows = [] if missing else table.select(list(COLUMNS)).to_pylist()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises more than pyarrow's own errors
        raise ProblemError(f"{path}: not a readable parquet file: {error}") from error
    if missing:
        raise ProblemError(
            f"{path}: every row from 0 on: no column {', '.join(missing)}; "
            f"there are {', '.join(table.column_names) or 'none'}"
        )
    return _check(rows, path)


def write_problems(path: str | os.PathLike[str], problems: Iterable[Problem]) -> None:
    """Writes what `read_problems` reads. The file appears whole or not at all."""
    rows = [
        {
            "data_source": p.data_source,
            "prompt": p.prompt,
            "ability": p.ability,
            "reward_model": {"ground_truth": p.ground_truth, "style": p.style},
            "extra_info": {"index": p.index},
        }
        for p in problems
    ]
    _check(rows, path)
    with written_whole(path) as new:
        pq.write_table(pa.Table.from_pylist(rows), new)


class ProblemOrder:
    """Batches of problems in a seeded order, shuffled anew each epoch; `taken` is where it stands.

    A batch never crosses into the next epoch, so that no problem is in it twice.
    """

    def __init__(self, problems: Sequence[Problem], size: int, seed: int) -> None:
        if size > len(problems):
            raise ValueError(f"a batch of {size} problems was asked for, there are {len(problems)}")
        self.problems, self.size, self.seed = problems, size, seed
        self.taken = 0

    def take(self) -> list[Problem]:
        epoch, batch = divmod(self.taken, len(self.problems) // self.size)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.problems), generator=shuffle).tolist()
        self.taken += 1
        return [self.problems[i] for i in order[batch * self.size : (batch + 1) * self.size]]
