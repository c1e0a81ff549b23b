"""What a run needs to go on as if it had never stopped: a directory, there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from dcpo_kernels.train.step import Trainer


def save(trainer: Trainer, directory: str | os.PathLike[str]) -> Path:
    """Model and tokenizer as transformers keep them, and the trainer's state beside."""
    final = Path(directory)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        trainer.model.save_pretrained(temporary)
        trainer.tokenizer.save_pretrained(temporary)
        torch.save(trainer.state_dict(), temporary / "trainer.pt")
        if final.exists():  # a directory can't be renamed onto another that holds something
            old = final.with_name(f".{final.name}.old.{os.getpid()}")
            os.rename(final, old)
            os.rename(temporary, final)
            shutil.rmtree(old)
        else:
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load(trainer: Trainer, directory: str | os.PathLike[str]) -> None:
    """Brings a trainer with the same configuration and problems to where the saved one stood."""
    directory = Path(directory)
    state = torch.load(directory / "trainer.pt", map_location="cpu", weights_only=True)
    saved = type(trainer.model).from_pretrained(directory, dtype="auto")
    trainer.model.load_state_dict(saved.state_dict())
    trainer.load_state_dict(state)


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest `step-N` in a directory."""
    found = [p for p in Path(directory).glob("step-*") if (p / "trainer.pt").exists()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)
