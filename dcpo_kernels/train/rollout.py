"""Sampled responses: a KV cache, prompts padded on the left, rows dropped as soon as they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.train.batch import head_sees
from dcpo_kernels.train.data import Problem

BLOCK = 256  # of the vocabulary, in `sample`


@dataclass(frozen=True)
class Rollout:
    """R responses, each with its prompt. Lists, since lengths differ; `collate` makes a batch."""

    prompts: list[list[int]]
    responses: list[list[int]]  # at least one token each, the end-of-sequence token included
    logprobs: list[Tensor]  # of the tokens as they were sampled, [length] float32 each

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, rows: Sequence[int]) -> Rollout:
        return Rollout(
            [self.prompts[i] for i in rows],
            [self.responses[i] for i in rows],
            [self.logprobs[i] for i in rows],
        )

    def __add__(self, other: Rollout) -> Rollout:
        return Rollout(
            self.prompts + other.prompts,
            self.responses + other.responses,
            self.logprobs + other.logprobs,
        )


def encode(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    """Prompt ids through the chat template; without one, the messages line by line."""
    texts = [
        tokenizer.apply_chat_template(problem.prompt, tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else "\n".join(message["content"] for message in problem.prompt)
        for problem in problems
    ]
    # The template writes the special tokens itself.
    return tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def decode(tokenizer: Any, responses: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: some models have several."""
    ids: set[int] = set()
    for given in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        ids.update(given if isinstance(given, (list, tuple)) else [given])
    return sorted(ids - {None})


def sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), and its log-probability.

    By the inverse of the distribution function, a block of the vocabulary first and a token inside
    it second. torch.multinomial draws a number per entry where this draws one per row. On two x86
    cores it took 301 ms of processor time to this one's 55 at 64 x 151,936 float32 logits, and 501
    to 55 at the demo's 512 x 32,768; one running sum per row, in float64, took 173 and 301.
    Overwrites float32 logits.
    """
    rows, vocabulary = logits.shape
    weights = logits.float()
    if temperature != 1:
        weights = weights / temperature
    weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK))
    weights = weights.view(rows, -1, BLOCK)
    point = torch.rand(rows, 1, dtype=torch.float64, device=logits.device, generator=generator)
    mass = weights.sum(-1).double()
    total = mass.sum(-1, keepdim=True)
    block, point = _find(mass, point * total)
    inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double()
    token, _ = _find(inside, point)
    logprobs = (inside.gather(1, token) / total).log()
    return (block * BLOCK + token)[:, 0], logprobs[:, 0].float()


def _find(masses: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """The interval that holds a point [rows, 1], and the offset in it: a row's masses [rows, n] are
    intervals laid end to end. Never an empty one."""
    ends = masses.cumsum(-1)
    below = torch.nextafter(ends[:, -1:], torch.zeros_like(point))
    point = torch.minimum(point, below).clamp(min=0)
    index = torch.searchsorted(ends, point, right=True)
    return index, point - (ends - masses).gather(1, index)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    end: Sequence[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """group_size responses to each prompt, those of a prompt one after the other.

    end: the ids that end a response; without one it ends after max_new_tokens.
    temperature: 0 takes the likeliest token; the log-probs are then 0.
    generator: on the model's device.
    """
    device = model.device
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
    )
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    stops = torch.tensor(list(end), device=device)

    count = len(prompts) * group_size
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    going = torch.arange(count, device=device)  # rows that have not ended
    cache = None
    for t in range(max_new_tokens):
        with head_sees(model, lambda hidden: hidden[:, -1:]):
            out = model(
                input_ids=input_ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        cache, logits = out.past_key_values, out.logits[:, -1]
        positions = positions[:, -1:]
        if t == 0:  # the prompt is read once for its whole group
            cache.batch_repeat_interleave(group_size)
            logits, attention, positions = (
                x.repeat_interleave(group_size, 0) for x in (logits, attention, positions)
            )
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen, logprobs[going, t] = sample(logits, temperature, generator)
        tokens[going, t] = chosen
        lengths[going] = t + 1
        on = ~torch.isin(chosen, stops)
        if not on.any():
            break
        if not on.all():
            keep = on.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            chosen, going, attention, positions = (
                x[keep] for x in (chosen, going, attention, positions)
            )
        input_ids, positions = chosen[:, None], positions + 1
        attention = torch.nn.functional.pad(attention, (0, 1), value=1)

    ends = lengths.tolist()
    rows, logprobs = tokens.tolist(), logprobs.cpu()
    return Rollout(
        [list(prompt) for prompt in prompts for _ in range(group_size)],
        [row[:n] for row, n in zip(rows, ends, strict=True)],
        [row[:n].clone() for row, n in zip(logprobs, ends, strict=True)],
    )
