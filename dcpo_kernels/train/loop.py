"""The loop: steps, metrics as JSON lines, evaluations and checkpoints in between."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpo_kernels.files import written_whole
from dcpo_kernels.train import checkpoint
from dcpo_kernels.train.step import Metrics, Trainer


class MetricsLog:
    """One JSON object per line, written in one call, so that no reader meets half of one."""

    def __init__(self, path: str | os.PathLike[str], steps: int = 0) -> None:
        """steps: where the run stands; lines of later steps, of a run that went on, are dropped."""
        kept = [line for line in read_metrics(path) if line["step"] <= steps]
        with written_whole(path) as new:
            new.write_bytes(b"".join(map(_line, kept)))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, metrics: Metrics) -> None:
        """OSError where the line does not fit on the disk: then nothing of it is there."""
        before = os.fstat(self._file).st_size
        left = _line(metrics)
        try:
            while left:  # a disk that is almost full takes a part
                left = left[os.write(self._file, left) :]
        except BaseException:
            os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        os.close(self._file)


def _line(metrics: Metrics) -> bytes:
    return (json.dumps(metrics) + "\n").encode()


def read_metrics(path: str | os.PathLike[str]) -> list[Metrics]:
    """The lines of a log. One that a crash cut short is left out, a broken one in the middle too,
    with a warning that names it."""
    if not Path(path).exists():
        return []
    found: list[Metrics] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            metrics = json.loads(line)
            if not isinstance(metrics["step"], int):
                raise TypeError(f"step {metrics['step']!r} is no number")
            found.append(metrics)
        except (ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{path}: line {number} is broken and left out: {error}", stacklevel=2)
    return found


def train(
    trainers: Mapping[str, Trainer],
    output_dir: str | os.PathLike[str],
    *,
    steps: int,
    deadline: float | None = None,
    evaluate_every: int = 0,
    evaluation: Callable[[Any], Metrics] | None = None,
    checkpoint_every: int = 0,
    advance: Callable[[int, str], None] = lambda steps, text: None,
) -> dict[str, list[Metrics]]:
    """Brings every trainer to `steps` steps. Returns the metrics by name of trainer.

    They also go to output_dir/NAME/metrics.jsonl, one line per step. The trainers take turns step
    by step, so that they have had the same budget whenever it ends.

    deadline: on time.monotonic; a round that would not be over by then is not begun.
    evaluation: of a model, every `evaluate_every` steps; its numbers join that step's metrics.
    checkpoint_every: steps between checkpoints, in output_dir/NAME/step-N; `checkpoint.load` brings
        a trainer there, and calling this again goes on.
    advance: told of rounds done, and what to say of them.
    """
    names = {name: Path(output_dir) / name for name in trainers}
    logs = {
        name: MetricsLog(path / "metrics.jsonl", trainers[name].steps)
        for name, path in names.items()
    }
    history: dict[str, list[Metrics]] = {name: [] for name in trainers}
    slowest = 0.0
    try:
        while behind := [name for name, trainer in trainers.items() if trainer.steps < steps]:
            start = time.monotonic()
            if deadline is not None and start + slowest > deadline:
                break
            for name in behind:
                trainer = trainers[name]
                metrics = trainer.step()
                if evaluation and evaluate_every and trainer.steps % evaluate_every == 0:
                    metrics |= evaluation(trainer.model)
                logs[name].write(metrics)
                history[name].append(metrics)
                if checkpoint_every and trainer.steps % checkpoint_every == 0:
                    checkpoint.save(trainer, names[name] / f"step-{trainer.steps}")
            latest = (f"{n} reward {h[-1]['reward']:+.2f}" for n, h in history.items() if h)
            advance(1, "  ".join(latest))
            slowest = max(slowest, time.monotonic() - start)
    finally:
        for log in logs.values():
            log.close()
    return history
