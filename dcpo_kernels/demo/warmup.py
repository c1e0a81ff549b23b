"""A small causal LM from scratch, taught by demonstrations until some answers are right."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dcpo_kernels.demo.arithmetic import Sum, as_problems
from dcpo_kernels.losses import selected_logprobs
from dcpo_kernels.train.batch import Batch, collate, response_logits
from dcpo_kernels.train.rollout import encode

BATCH = 64
LEARNING_RATE = 4e-3
PADDED_STEPS = 20  # at full width


def make_model(tokenizer: Any, hidden_size: int, layers: int) -> Any:
    heads = max(n for n in range(1, max(1, hidden_size // 16) + 1) if hidden_size % n == 0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            n_positions=32,
            activation_function="gelu",
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def pad_vocabulary(model: Any, vocab_size: int, unused_id: int) -> None:
    """Adds rows that no token has, as real vocabularies have them to round up their size.

    They start as copies of a row never used, which is already unlikely.
    """
    used = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[used:] = table.weight[unused_id]


def warm_up(
    model: Any,
    tokenizer: Any,
    sums: Sequence[Sum],
    *,
    steps: int,
    vocab_size: int,
    seed: int,
    deadline: float = float("inf"),
    advance: Callable[[int, str], None] = lambda steps, text: None,
) -> int:
    """Supervised steps with the vocabulary as it is, where they are cheap, and a few more padded.

    Returns the steps made: fewer than asked for only if the deadline (time.monotonic) came first.
    """
    generator = random.Random(seed)
    prompts = encode(tokenizer, as_problems(list(sums), 0))

    def demonstrations() -> Batch:
        chosen = generator.choices(range(len(sums)), k=BATCH)
        texts = [f"{sums[i].demonstration(generator)} {tokenizer.eos_token}" for i in chosen]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return collate([prompts[i] for i in chosen], answers)

    # The rate is high until most is learned, then falls.
    made = 0
    optimizer = _optimizer(model)
    with one_thread():
        for step in range(steps):
            if time.monotonic() > deadline:
                break
            rate = min((step + 1) / 50, 1, (steps - step) / (0.3 * steps))
            loss = imitate(model, optimizer, demonstrations(), LEARNING_RATE * rate)
            made += 1
            advance(1, f"loss {loss:.2f}")
    # These steps teach the model that the new rows are never the answer.
    pad_vocabulary(model, vocab_size, tokenizer.convert_tokens_to_ids("<|pad|>"))
    optimizer = _optimizer(model)
    for _ in range(PADDED_STEPS):
        loss = imitate(model, optimizer, demonstrations(), 0.3 * LEARNING_RATE)
        advance(1, f"loss {loss:.2f}")
    return made + PADDED_STEPS


@contextmanager
def one_thread() -> Iterator[None]:
    """For work so small that several threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def imitate(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, learning_rate: float
) -> float:
    """One supervised step on the response tokens; returns the loss."""
    optimizer.param_groups[0]["lr"] = learning_rate
    logits = response_logits(model, batch)
    logprobs, _ = selected_logprobs(logits, batch.target_ids, inplace=True)
    loss = -logprobs.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
