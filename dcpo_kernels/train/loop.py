"""The loop: steps, metrics as JSON lines, evaluations and checkpoints in between."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpo_kernels.train import checkpoint
from dcpo_kernels.train.step import Metrics, Trainer


class MetricsLog:
    """One JSON object a line, written in one call, so that no reader meets half of one."""

    def __init__(self, path: str | os.PathLike[str], steps: int = 0) -> None:
        """steps: where the run stands; lines of later steps, of a run that went on, are dropped."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= steps]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_bytes(b"".join(map(_line, kept)))
        os.replace(temporary, self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def write(self, metrics: Metrics) -> None:
        os.write(self._file, _line(metrics))

    def close(self) -> None:
        os.close(self._file)


def _line(metrics: Metrics) -> bytes:
    return (json.dumps(metrics) + "\n").encode()


def read_metrics(path: str | os.PathLike[str]) -> list[Metrics]:
    """The lines of a log; one that a crash cut short is left out."""
    if not Path(path).exists():
        return []
    whole, _, _ = Path(path).read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


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

    They also go to output_dir/NAME/metrics.jsonl, a line a step. The trainers take turns, a step
    each, so that they have had the same budget whenever it ends.

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
