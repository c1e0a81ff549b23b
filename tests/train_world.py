"""A world small enough for tests: sums of three numbers, and a model with some idea of them."""

from __future__ import annotations

import copy
import functools
import resource
from contextlib import contextmanager
from typing import Any

import torch

from dcpo_kernels.demo.arithmetic import as_problems, make_sums, make_tokenizer
from dcpo_kernels.demo.warmup import make_model, warm_up
from dcpo_kernels.train import Trainer, recipes

VOCAB = 45  # odd, and more than the tokenizer has
TOKENIZER = make_tokenizer()
SUMS = make_sums(96, 3, seed=0)
PROBLEMS = as_problems(SUMS[:16], first_index=100)
HELDOUT = as_problems(SUMS[16:32], first_index=200)


@functools.cache
def _model(warmup_steps: int) -> Any:
    torch.manual_seed(0)
    model = make_model(TOKENIZER, hidden_size=32, layers=1)
    warm_up(model, TOKENIZER, SUMS[32:], steps=warmup_steps, vocab_size=VOCAB, seed=0)
    return model


def small_model(warmup_steps: int = 60) -> Any:
    """A fresh copy: it answers in the format, and is right now and then."""
    return copy.deepcopy(_model(warmup_steps))


def small_trainer(method: str = "dcpo", model: Any = None, **parts: Any) -> Trainer:
    sizes = {
        "prompts_per_step": 4,
        "group_size": 4,
        "minibatches": 2,
        "micro_batch_size": 3,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
        **parts,
    }
    config = recipes(**sizes)[method]
    return Trainer(small_model() if model is None else model, TOKENIZER, PROBLEMS, config)


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if "second" not in k}


@contextmanager
def disk_of(size: int):
    """No file can grow beyond `size` bytes, as on a disk that is full: a write ends short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
