"""From token lists to logits that exist for response tokens only, packed one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    input_ids: Tensor  # [B, L] prompt and response without its last token, padded on the right
    attention_mask: Tensor  # [B, L]
    predicts: Tensor  # [B, L] bool: the logits here predict a response token
    target_ids: Tensor  # [N] the response tokens, packed
    lengths: Tensor  # [B] tokens of each response; they add up to N


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
) -> Batch:
    """Rows of one length. What pads them is never read: no id of the tokenizer is needed for it."""
    lengths = [len(response) for response in responses]
    rows = [[*prompt, *response][:-1] for prompt, response in zip(prompts, responses, strict=True)]
    size = (len(rows), max(map(len, rows), default=0))
    input_ids = torch.zeros(size, dtype=torch.int64)
    attention_mask = torch.zeros(size, dtype=torch.int64)
    predicts = torch.zeros(size, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        predicts[i, len(row) - lengths[i] : len(row)] = True
    target_ids = torch.tensor(list(itertools.chain.from_iterable(responses)), dtype=torch.int64)
    parts = (input_ids, attention_mask, predicts, target_ids, torch.tensor(lengths))
    return Batch(*(part.to(device) for part in parts))


@contextmanager
def head_sees(model: Any, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The vocabulary projection gets select(hidden) in place of all hidden states [B, L, D].

    A hook, and not a call of the head: what a model does to its logits afterwards (scale, soft cap)
    still happens.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: (select(arguments[0]), *arguments[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def response_logits(model: Any, batch: Batch) -> Tensor:
    """[N, V] logits that predict batch.target_ids. No others are computed."""
    with head_sees(model, lambda hidden: hidden[batch.predicts]):
        return model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
