"""Checkpoints: a directory with all that a run needs to resume, written whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from dcpo_kernels.files import written_whole
from dcpo_kernels.train.step import Trainer


def save(trainer: Trainer, directory: str | os.PathLike[str]) -> Path:
    """Model and tokenizer as transformers keep them, and the trainer's state beside."""
    with written_whole(directory) as new:
        new.mkdir()
        trainer.model.save_pretrained(new)
        trainer.tokenizer.save_pretrained(new)
        torch.save(trainer.state_dict(), new / "trainer.pt")
    return Path(directory)


def load(trainer: Trainer, directory: str | os.PathLike[str]) -> None:
    """Brings a trainer with the same configuration and problems to where the saved one stood."""
    directory = Path(directory)
    state = torch.load(directory / "trainer.pt", map_location="cpu", weights_only=True)
    saved = type(trainer.model).from_pretrained(directory, dtype="auto")
    trainer.model.load_state_dict(saved.state_dict())
    trainer.load_state_dict(state)


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest `step-N` that `save` made in a directory; other names, and links, don't count."""
    found = [
        (int(name[1]), path)
        for path in Path(directory).glob("step-*")
        if (name := re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name))
        and not path.is_symlink()
        and (path / "trainer.pt").is_file()
    ]
    return max(found, default=(0, None))[1]
