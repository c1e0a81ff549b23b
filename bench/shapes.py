"""What can be asked for: one operator on one batch of logits, by numbers or by a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

import dcpo_kernels as dk

# Rows of the output embedding: how wide the logits are.
MODELS = {
    "qwen2.5": 151936,  # 0.5B to 3B
    "qwen2.5-7b": 152064,  # and larger
    "llama3": 128256,
    "gemma": 262144,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Every preset of the package, with its own defaults, and what needs more of a row or more inputs.
OBJECTIVES = {
    name: getattr(dk, name)
    for name in dk.__all__
    if getattr(getattr(dk, name), "__annotations__", {}).get("return") == "Objective"
} | {
    "dcpo-entropy": lambda: dk.dcpo(entropy_coef=0.001),
    "dppo-topk": lambda: dk.dppo("topk_tv"),
    "dppo-full": lambda: dk.dppo("tv"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A group of rows in the table: they share their inputs and are timed in turns."""

    operator: str
    objective: str  # "" for an operator that takes none
    tokens: int
    vocab: int
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Literal["cpu", "cuda"]
    zero_advantage: float = 0.0  # share of the tokens whose response has advantage 0
    masked: float = 0.0  # share of the tokens that don't count

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.vocab

    def describe(self) -> str:
        parts = [
            f"{self.operator} {self.objective}".strip(),
            f"{self.tokens} x {self.vocab} {self.dtype} on {self.device}",
        ]
        if self.masked:
            parts.append(f"{self.masked:.0%} masked")
        if self.zero_advantage:
            parts.append(f"{self.zero_advantage:.0%} with advantage 0")
        return ", ".join(parts)


def vocab_of(text: str) -> int:
    """A model's name or a number."""
    return MODELS[text] if text in MODELS else positive(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{text!r} is not a number from 1 up, nor one of {', '.join(MODELS)}")
    return int(text)
