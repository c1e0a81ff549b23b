"""Logits and token scalars like those of a training step: never zeros, never uniform noise.

Values matter: they set a GPU's power and with it its clock, and a peaked row finds errors that a
flat one hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.shapes import DTYPES, OBJECTIVES, Case

NOISE = 2.5  # standard deviation of all other logits
CANDIDATES = 16  # tokens that share most of a row's probability
TOP_K = 20  # what a rollout engine reports, for the objectives that ask
CHUNK_BYTES = 2**28  # of float64 logits: what the reference takes at once


@dataclass(frozen=True)
class Inputs:
    """R responses, packed as [N, V] with `lengths` or padded as [R, T, V] with `mask`."""

    case: Case
    logits: Tensor
    target_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor  # [R]
    upstream: Tensor  # like target_ids: the gradient of some loss in the log-probs
    totals: dict[str, int]  # normalizers of the whole batch, so that a chunk gives its share
    lengths: Tensor | None = None
    mask: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)  # topk_ids, ..: where they are needed

    @property
    def objective(self) -> dk.Objective:
        return OBJECTIVES[self.case.objective]()

    def loss_arguments(self) -> dict[str, Any]:
        """What policy_loss takes besides the logits."""
        return {
            "target_ids": self.target_ids,
            "old_logprobs": self.old_logprobs,
            "advantages": self.advantages,
            "lengths": self.lengths,
            "mask": self.mask,
            "objective": self.objective,
            **self.totals,
            **self.extra,
        }

    def counting_rows(self, skip_zero_advantage: bool = False) -> int:
        """Rows that a kernel has to read."""
        lengths = self.lengths if self.mask is None else self.mask.sum(1)
        if skip_zero_advantage:
            lengths = lengths[self.advantages != 0]
        return int(lengths.sum())

    def chunks(self) -> Iterator[tuple[slice, Inputs]]:
        """A few whole responses at a time, in float64, with their slice of the first dimension of
        tensors that are per token."""
        padded = self.mask is not None
        tokens = self.mask.shape[1] if padded else 1  # per entry of that dimension
        sizes = [1] * len(self.mask) if padded else self.lengths.tolist()
        limit = CHUNK_BYTES // (8 * self.case.vocab * tokens)
        first = begin = 0
        while first < len(sizes):
            last, end = first + 1, begin + sizes[first]
            while last < len(sizes) and end + sizes[last] - begin <= limit:
                end, last = end + sizes[last], last + 1
            yield slice(begin, end), self._part(slice(begin, end), slice(first, last))
            first, begin = last, end

    def _part(self, at: slice, responses: slice) -> Inputs:
        extra = {name: x[at] for name, x in self.extra.items()}
        if "old_logits" in extra:
            extra["old_logits"] = extra["old_logits"].double()
        return replace(
            self,
            logits=self.logits[at].double(),
            target_ids=self.target_ids[at],
            old_logprobs=self.old_logprobs[at],
            advantages=self.advantages[responses],
            upstream=self.upstream[at].double(),
            lengths=None if self.lengths is None else self.lengths[responses],
            mask=None if self.mask is None else self.mask[at],
            extra=extra,
        )


def response_count(tokens: int) -> int:
    return min(tokens, max(8, tokens // 512))


def real_lengths(responses: int, total: int, most: int, generator: torch.Generator) -> Tensor:
    """Response lengths as they come, log-normal: the longest is several times the shortest. They
    add up to `total`; each lies in 1..most."""
    if not responses <= total <= responses * most:
        raise ValueError(f"{responses} responses of 1 to {most} tokens can't have {total} tokens")
    draw = torch.exp(0.6 * torch.randn(responses, generator=generator))
    lengths = (draw / draw.sum() * total).round().long().clamp(1, most)
    while (missing := total - int(lengths.sum())) != 0:
        movable = (lengths < most if missing > 0 else lengths > 1).nonzero()[:, 0]
        lengths[movable[: abs(missing)]] += 1 if missing > 0 else -1
    return lengths


def _peaked_rows(rows: int, case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[rows, V] logits and targets sampled from them. Most rows are nearly certain of one token
    (the rest of the vocabulary has 1e-4 to 0.1 of the probability), some are torn between several,
    as in a language model that reasons."""
    device = generator.device
    x = torch.empty(rows, case.vocab, device=device).normal_(0.0, NOISE, generator=generator)
    few = min(CANDIDATES, case.vocab)
    ids = torch.randint(case.vocab, (rows, few), generator=generator, device=device)
    certainty = 10 ** (2 * torch.rand(rows, 1, generator=generator, device=device) - 1)
    gaps = certainty * torch.empty(rows, few, device=device).exponential_(generator=generator)
    gaps[:, 0] = 0.0
    rest = math.log(case.vocab) + 0.5 * NOISE**2  # log of sum exp of the noise
    peak = rest + 2 + 7 * torch.rand(rows, 1, generator=generator, device=device)
    x.scatter_(1, ids, peak - gaps.cumsum(1).clamp(max=18.0))
    x = x.to(DTYPES[case.dtype])
    targets = torch.multinomial(torch.softmax(x.float(), 1), 1, generator=generator)
    return x, targets[:, 0]


def make(case: Case, seed: int = 0) -> Inputs:
    device, tokens, dtype = case.device, case.tokens, DTYPES[case.dtype]
    scalars = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(tokens, case.vocab, dtype=dtype, device=device)
    target_ids = torch.empty(tokens, dtype=torch.int64, device=device)
    logprobs = torch.empty(tokens, device=device)
    step = max(1, CHUNK_BYTES // (8 * case.vocab))
    for begin in range(0, tokens, step):
        at = slice(begin, min(begin + step, tokens))
        logits[at], target_ids[at] = _peaked_rows(at.stop - begin, case, generator)
        with torch.no_grad():
            logprobs[at] = dk.selected_logprobs(logits[at], target_ids[at], backend="reference")[0]

    def normal() -> Tensor:
        return torch.randn(tokens, generator=scalars).to(device)

    # A few optimizer steps after the rollout: most ratios near 1, some beyond every bound.
    old_logprobs = logprobs + torch.where(normal().abs() < 1.5, 0.05, 0.5) * normal()
    old_logprobs = old_logprobs.clamp(max=0.0)
    upstream = normal() / tokens

    responses = response_count(tokens)
    shape: tuple[int, ...] = (tokens,)
    lengths = mask = None
    if case.masked:
        responses = next(r for r in range(responses, 0, -1) if tokens % r == 0)
        shape = (responses, tokens // responses)
        counts = real_lengths(responses, round((1 - case.masked) * tokens), shape[1], scalars)
        mask = (torch.arange(shape[1]) < counts[:, None]).to(device)
        target_ids = torch.where(mask.view(-1), target_ids, -100)  # what engines leave in padding
        upstream = upstream * mask.view(-1)
    else:
        counts = real_lengths(responses, tokens, tokens, scalars)
        lengths = counts.to(device)

    advantages = torch.randn(responses, generator=scalars)
    budget = case.zero_advantage * int(counts.sum())
    for i in counts.argsort(descending=True).tolist():
        if counts[i] <= budget:
            advantages[i], budget = 0.0, budget - int(counts[i])

    extra: dict[str, Tensor] = {}
    objective = OBJECTIVES[case.objective]() if case.objective else None
    if objective is not None and objective.needs_topk:
        top = logits.topk(min(TOP_K, case.vocab)).indices
        reported = logits.gather(1, top).float() - logits.float().logsumexp(1, keepdim=True)
        extra["topk_ids"] = top.view(*shape, -1)
        extra["topk_logprobs"] = (reported - 0.05 * normal().abs()[:, None]).view(*shape, -1)
    if objective is not None and objective.needs_old_logits:
        noise = torch.randn(logits.shape, generator=generator, dtype=dtype, device=device)
        extra["old_logits"] = (logits + 0.1 * noise).view(*shape, -1)
    return Inputs(
        case,
        logits.view(*shape, -1),
        target_ids.view(shape),
        old_logprobs.view(shape),
        advantages.to(device),
        upstream.view(shape),
        {
            "num_responses": responses,
            "num_tokens": int(counts.sum()),
            "max_length": int(counts.max()),
        },
        lengths,
        mask,
        extra,
    )
