"""The demo's world, made from a seed: sums of small numbers, a tokenizer, demonstrations."""

from __future__ import annotations

import random
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dcpo_kernels.train.data import Problem

LARGEST = 20  # no running total is larger, or below 0
MAX_NEW_TOKENS = 10

# How the demonstrations answer, as text from the web might: most guess and are off by a little,
# some work it out total by total and are right, some forget the format. Only the reward tells which
# style is worth imitating.
STYLES = {"guessed": 0.5, "worked": 0.35, "unformatted": 0.15}
GUESSED_RIGHT = 0.1

_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


class Sum(NamedTuple):
    text: str  # "7 + 8 - 3 + 9"
    totals: list[int]  # 15, 12, 21

    def demonstration(self, generator: random.Random) -> str:
        """A response in one of the styles."""
        (style,) = generator.choices(list(STYLES), list(STYLES.values()))
        answer = self.totals[-1]
        if style == "worked":
            return " ".join(map(str, self.totals)) + rf" \boxed{{ {answer} }}"
        if generator.random() > GUESSED_RIGHT:
            answer += generator.choice([d for d in (-2, -1, 1, 2) if 0 <= answer + d <= LARGEST])
        return rf"\boxed{{ {answer} }}" if style == "guessed" else f"answer {answer}"


def make_sums(count: int, operands: int, seed: int) -> list[Sum]:
    """Distinct sums of one-digit numbers in a seeded order: slices of it are disjoint."""
    generator = random.Random(seed)
    found: dict[str, Sum] = {}
    repeats = 0
    while len(found) < count:
        total = generator.randint(1, 9)
        words, totals = [str(total)], []
        while len(totals) < operands - 1:
            sign, digit = generator.choice((1, -1)), generator.randint(1, 9)
            if 0 <= total + sign * digit <= LARGEST:
                total += sign * digit
                words += ["+" if sign > 0 else "-", str(digit)]
                totals.append(total)
        text = " ".join(words)
        repeats = repeats + 1 if text in found else 0
        if repeats > 10_000:
            raise ValueError(f"there are no {count} distinct sums of {operands} numbers")
        found.setdefault(text, Sum(text, totals))
    return list(found.values())


def as_problems(sums: list[Sum], first_index: int) -> list[Problem]:
    return [
        Problem(
            index=first_index + i,
            prompt=[{"role": "user", "content": s.text}],
            ground_truth=str(s.totals[-1]),
            data_source="dcpo-demo/sums",
        )
        for i, s in enumerate(sums)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = [*special, "+", "-", "answer", r"\boxed{", "}", *map(str, range(LARGEST + 1))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_TEMPLATE,
    )
