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
    predicts: Tensor  # [B, L] bool: the logits here predict a response token
    target_ids: Tensor  # [N] the response tokens, packed
    lengths: Tensor  # [B] tokens of each response; they add up to N


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
) -> Batch:
    """Rows of one length, padded on the right, where no token of a causal model sees the padding.

    At least one response, and every prompt and response at least one token.
    """
    lengths = [len(response) for response in responses]
    rows = [[*prompt, *response][:-1] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    place = torch.arange(width)
    predicts = (place < ends) & (place >= ends - torch.tensor(lengths)[:, None])
    target_ids = torch.tensor(list(itertools.chain.from_iterable(responses)))
    parts = (input_ids, predicts, target_ids, torch.tensor(lengths))
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


def response_states(model: Any, batch: Batch) -> Tensor:
    """[N, D] what the vocabulary projection gets at the places that predict batch.target_ids."""
    seen: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        seen.append(hidden[batch.predicts])
        return hidden[:, :0]  # no logits are made

    with head_sees(model, select):
        model(input_ids=batch.input_ids, use_cache=False)
    return seen[0]


def response_logits(model: Any, batch: Batch) -> Tensor:
    """[N, V] logits that predict batch.target_ids. No others are computed."""
    with head_sees(model, lambda hidden: hidden[batch.predicts]):
        return model(input_ids=batch.input_ids, use_cache=False).logits
