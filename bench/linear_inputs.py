"""Hidden states and a head like those of a training step, and the float64 gradients of any loss of
their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.shapes import DTYPES

RESPONSES = 8  # of one length each
NOISE = 1.5  # standard deviation of the logits that nothing speaks for
CANDIDATES = 4  # tokens that share most of a row's probability
SAMPLE = 512  # rows of hidden states, and of the weight, whose gradients are compared
CHUNK_BYTES = 2**28  # of float64 logits


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """A group of rows in the table: they share their inputs and are timed in turns."""

    tokens: int
    width: int
    vocab: int
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Literal["cpu", "cuda"]

    def describe(self) -> str:
        shape = f"{self.tokens} x {self.width} x {self.vocab}"
        return f"linear, {shape} {self.dtype} on {self.device}"


@dataclass(frozen=True)
class Batch:
    """R responses of T tokens: N = R T rows."""

    case: LinearCase
    hidden: Tensor  # [R, T, D]
    weight: Tensor  # [V, D]
    target_ids: Tensor  # [R, T]
    old_logprobs: Tensor  # [R, T]
    advantages: Tensor  # [R]

    @property
    def rows(self) -> Tensor:
        """[N, D]"""
        return self.hidden.flatten(0, 1)


@dataclass(frozen=True)
class Problem:
    """A loss of a batch: a policy loss, or the cross entropy where there is no objective."""

    batch: Batch
    objective: dk.Objective | None
    mask: Tensor  # [R, T]
    advantages: Tensor  # [R]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the policy losses take besides hidden states, weight and targets."""
        return {
            "old_logprobs": self.batch.old_logprobs,
            "advantages": self.advantages,
            "mask": self.mask,
            "objective": self.objective,
        }

    def of_logprobs(self, logprobs: Tensor) -> Tensor:
        """[R, T] to the loss, in PyTorch."""
        if self.objective is None:
            return -logprobs.mean()
        return dk.policy_loss_from_logprobs(logprobs, **self.arguments, backend="reference").loss


def make(case: LinearCase, seed: int = 0) -> Batch:
    """Rows as peaked as a language model's: a hidden state has noise, and a share of the weights of
    a few candidates, which are nearly orthogonal. Most rows are nearly certain of one of them, some
    are torn."""
    device, dtype = case.device, DTYPES[case.dtype]
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    weight = (normal(case.vocab, case.width) / math.sqrt(case.width)).to(dtype)
    few = (case.tokens, CANDIDATES)
    ids = torch.randint(case.vocab, few, generator=draw, device=device)
    certainty = 10 ** (2 * torch.rand(case.tokens, 1, generator=draw, device=device) - 1)
    gaps = certainty * torch.empty(few, device=device).exponential_(generator=draw)
    gaps[:, 0] = 0.0
    rest = math.log(case.vocab) + 0.5 * NOISE**2  # log of sum exp of the noise
    peak = rest + 2 + 7 * torch.rand(case.tokens, 1, generator=draw, device=device)
    share = (peak - gaps.cumsum(1)).clamp(min=0)
    hidden = NOISE * normal(case.tokens, case.width)
    for i in range(CANDIDATES):
        hidden += share[:, i, None] * weight[ids[:, i]].float()
    hidden = hidden.to(dtype)

    target_ids = torch.empty(case.tokens, dtype=torch.int64, device=device)
    logprobs = torch.empty(case.tokens, device=device)
    for at in _parts(case.tokens, case.vocab):
        log_p = torch.log_softmax((hidden[at] @ weight.t()).float(), 1)
        target_ids[at] = torch.multinomial(log_p.exp(), 1, generator=draw)[:, 0]
        logprobs[at] = log_p.gather(1, target_ids[at, None])[:, 0]
    # Ratios well within every bound: a gradient that rounding switches off would hide other errors.
    old_logprobs = (logprobs + 0.05 * normal(case.tokens).clamp(-2, 2)).clamp(max=0.0)
    shape = (RESPONSES, case.tokens // RESPONSES)
    return Batch(
        case,
        hidden.view(*shape, -1),
        weight,
        target_ids.view(shape),
        old_logprobs.view(shape),
        normal(RESPONSES),
    )


def problem(
    batch: Batch, objective: dk.Objective | None, *, masked: bool = False, zero: bool = False
) -> Problem:
    """masked: every other token does not count. zero: every other response has advantage 0."""
    mask, advantages = torch.ones_like(batch.target_ids, dtype=torch.bool), batch.advantages.clone()
    if masked:
        mask[:, 1::2] = False
    if zero:
        advantages[1::2] = 0.0
    return Problem(batch, objective, mask, advantages)


def _parts(tokens: int, vocab: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (8 * vocab))
    return (slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size))


class Exact:
    """What the gradients are in float64. Log-probabilities are those of all rows, which costs one
    product; gradients are made of SAMPLE rows of each matrix, which costs next to nothing. Small
    matrices are compared whole."""

    def __init__(self, batch: Batch) -> None:
        case, self.batch = batch.case, batch
        self.hidden, self.weight = batch.rows.double(), batch.weight.double()
        targets = batch.target_ids.flatten()
        self.lse = self.hidden.new_empty(case.tokens)
        logprobs = torch.empty_like(self.lse)
        for at in _parts(case.tokens, case.vocab):
            logits = self.hidden[at] @ self.weight.t()
            self.lse[at] = logits.logsumexp(1)
            logprobs[at] = logits.gather(1, targets[at, None])[:, 0] - self.lse[at]
        self.logprobs = logprobs.view_as(batch.target_ids)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randperm(case.tokens, generator=draw)[:SAMPLE].to(case.device)
        # Half of the ids are targets, whose rows of the weight's gradient are the large ones.
        others = torch.randperm(case.vocab, generator=draw).to(case.device)
        ids = torch.cat([targets[rows[: SAMPLE // 2]], others])
        self.rows, self.ids = rows, _first_unique(ids, SAMPLE)

    def gradients(self, of: Problem) -> tuple[Tensor, Tensor]:
        """Of self.rows of the hidden states, and of self.ids of the weight."""
        leaf = self.logprobs.clone().requires_grad_()
        (g,) = torch.autograd.grad(of.of_logprobs(leaf), leaf)
        g, targets = g.double().flatten(), self.batch.target_ids.flatten()

        def of_logits(rows: Tensor | slice, ids: Tensor | slice) -> Tensor:
            """dl/dx_j = g (1[j = y] - p_j)"""
            p = (self.hidden[rows] @ self.weight[ids].t() - self.lse[rows, None]).exp()
            known = torch.arange(len(self.weight), device=p.device)[ids]
            return g[rows, None] * ((targets[rows, None] == known).double() - p)

        everything = slice(None)
        of_hidden = torch.cat(
            [of_logits(rows, everything) @ self.weight for rows in self.rows.split(64)]
        )
        return of_hidden, of_logits(everything, self.ids).t() @ self.hidden

    def errors(self, of: Problem, found: tuple[Tensor, Tensor]) -> list[float]:
        """Root mean square errors of both gradients, in units of the gradient's own."""
        of_hidden, of_weight = found
        sampled = (of_hidden.flatten(0, -2)[self.rows], of_weight[self.ids])
        return [
            float((x.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
            for x, exact in zip(sampled, self.gradients(of), strict=True)
        ]


def _first_unique(ids: Tensor, count: int) -> Tensor:
    """The first `count` different ids, in order of size."""
    seen: dict[int, None] = {}
    for i in ids.tolist():
        seen[i] = None
        if len(seen) == count:
            break
    return torch.tensor(sorted(seen), device=ids.device)
