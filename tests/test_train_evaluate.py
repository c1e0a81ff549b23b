"""Avg@k of models whose accuracy is known by construction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from train_world import HELDOUT, TOKENIZER, VOCAB, small_model

from dcpo_kernels.train import evaluate
from dcpo_kernels.train.rollout import encode


class Remembered:
    """The token sequences so far, in place of keys and values."""

    def __init__(self, ids):
        self.ids = ids

    def batch_repeat_interleave(self, n):
        self.ids = self.ids.repeat_interleave(n, 0)

    def batch_select_indices(self, rows):
        self.ids = self.ids[rows]


class Oracle:
    """Answers a problem with given texts, drawn evenly when sampled, the first when greedy."""

    device = torch.device("cpu")
    training = False
    generation_config = SimpleNamespace(eos_token_id=TOKENIZER.eos_token_id)

    def __init__(self, answers):
        self.answers = {
            tuple(prompt): [TOKENIZER(f"{text} <|end|>")["input_ids"] for text in texts]
            for prompt, texts in answers
        }
        self.head = torch.nn.Identity()

    def get_output_embeddings(self):
        return self.head

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, input_ids, attention_mask, past_key_values, **_):
        if past_key_values is not None:
            input_ids = torch.cat([past_key_values.ids, input_ids], 1)
        logits = torch.full((*input_ids.shape, VOCAB), -torch.inf)
        for row, (ids, real) in enumerate(zip(input_ids, attention_mask, strict=True)):
            sequence = ids[real.bool()].tolist()
            prompt = next(p for p in self.answers if tuple(sequence[: len(p)]) == p)
            said = sequence[len(prompt) :]
            for rank, answer in enumerate(self.answers[prompt]):
                if answer[: len(said)] == said:
                    logits[row, -1, answer[len(said)]] = -1e-6 * rank
        return SimpleNamespace(logits=self.head(logits), past_key_values=Remembered(input_ids))


def oracle(answer):
    return Oracle(
        [
            (p, answer(int(q.ground_truth)))
            for p, q in zip(encode(TOKENIZER, HELDOUT), HELDOUT, strict=True)
        ]
    )


def box(number):
    return rf"\boxed{{ {number % 21} }}"


def test_a_model_that_is_always_right():
    done = evaluate(oracle(lambda n: [box(n)]), TOKENIZER, HELDOUT, samples=5, max_new_tokens=8)
    assert done == (1.0, 0.0, 0.0, 4.0)


def test_greedy_takes_the_likeliest():
    model = oracle(lambda n: [box(n + 1), box(n)])
    done = evaluate(model, TOKENIZER, HELDOUT, temperature=0, max_new_tokens=8)
    assert done.accuracy == 0 and done.unformatted == 0
    model = oracle(lambda n: [f"answer {n}", box(n)])
    assert evaluate(model, TOKENIZER, HELDOUT, temperature=0, max_new_tokens=8)[:3] == (0, 0, 1)


def test_avg_at_k():
    """Right half of the time on even answers and never on odd ones."""
    model = oracle(lambda n: [box(n + 1), box(n)] if n % 2 == 0 else [box(n + 1), f"answer {n}"])
    even = sum(int(p.ground_truth) % 2 == 0 for p in HELDOUT) / len(HELDOUT)
    told = []
    done = evaluate(
        model,
        TOKENIZER,
        HELDOUT,
        samples=200,
        max_new_tokens=8,
        batch_size=600,
        advance=told.append,
    )
    assert done.accuracy == pytest.approx(even / 2, abs=0.02)
    assert done.unformatted == pytest.approx((1 - even) / 2, abs=0.02)
    # The spread over problems: 1/2 or 0, by the answer.
    assert done.error == pytest.approx((even * (1 - even)) ** 0.5 / 2 / 16**0.5, rel=0.1)
    assert sum(told) == len(HELDOUT) and max(told) == 3


def test_evaluation_is_repeatable_and_leaves_no_trace():
    model = small_model().train()
    state = torch.get_rng_state()
    runs = [
        evaluate(model, TOKENIZER, HELDOUT, samples=4, max_new_tokens=8, batch_size=size)
        for size in (64, 64)
    ]
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="samples=0"):
        evaluate(small_model(), TOKENIZER, HELDOUT, samples=0)
    with pytest.raises(ValueError, match="1 at temperature 0"):
        evaluate(small_model(), TOKENIZER, HELDOUT, samples=2, temperature=0)
    with pytest.raises(ValueError, match="no problems"):
        evaluate(small_model(), TOKENIZER, [])
