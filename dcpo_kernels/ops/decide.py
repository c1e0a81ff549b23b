"""decide: every token's loss and the coefficients of its gradient, from log-probabilities that are
there. For objectives that look at a whole response first."""

from __future__ import annotations

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.decide import BINARY_KL
from dcpo_kernels.objective import DIVERGENCES, Numbers
from dcpo_kernels.ops.library import check_tensors, define
from dcpo_kernels.ops.records import (
    Coefficients,
    Decisions,
    RatioGroups,
    Read,
    Tokens,
    schema_of,
    unpack,
)


def _results(logprobs: Tensor, numbers: Numbers) -> tuple[Decisions, Coefficients]:
    def new(dtype=None):
        return torch.empty_like(logprobs, dtype=dtype)

    h = new() if numbers.entropy_coef != 0 else logprobs.new_empty(0)
    return Decisions(new(), new(), new(torch.int8)), Coefficients(new(), h)


def _check_needs(read: Read, tokens: Tokens, numbers: Numbers) -> None:
    for name, x, coefficient in (
        ("entropy", read.entropy, numbers.entropy_coef),
        ("ref_logprobs", tokens.ref_logprobs, numbers.kl_coef),
    ):
        if x is None and coefficient != 0:
            raise ValueError(f"{name} is None, and the objective has a term of it")
    if numbers.divergence > BINARY_KL:
        name = DIVERGENCES[numbers.divergence]
        raise ValueError(f"divergence={name!r} takes more of a row than its log-probability")
    if numbers.score_centering:
        raise ValueError("score_centering takes more of a row than its log-probability")


def _launch(*flat):
    read, tokens, numbers, groups, (backend,) = unpack(flat, *_RECORDS)
    _check_needs(read, tokens, numbers)
    count = read.logprobs.numel()
    check_tensors(read.logprobs, read, count)
    check_tensors(read.logprobs, tokens, count)
    check_tensors(read.logprobs, groups, groups.lengths.numel(), offsets=groups.offsets.numel())
    decisions, coefficients = _results(read.logprobs, numbers)
    if count:
        backends.kernels(backend).decide(read, tokens, numbers, groups, decisions, coefficients)
    return *decisions, *coefficients


def _fake(*flat):
    read, _, numbers, _, _ = unpack(flat, *_RECORDS)
    decisions, coefficients = _results(read.logprobs, numbers)
    return *decisions, *coefficients


_RECORDS = (Read, Tokens, Numbers, RatioGroups)
decide = define(
    f"decide({schema_of(*_RECORDS)}, str backend) -> ({schema_of(Decisions, Coefficients)})",
    _launch,
    _fake,
)
