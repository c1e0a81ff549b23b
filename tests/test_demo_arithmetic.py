"""The demo's world: sums, demonstrations of every style, and the tokenizer."""

from __future__ import annotations

import random

import pytest
from train_world import TOKENIZER

from dcpo_kernels.demo.arithmetic import LARGEST, STYLES, as_problems, make_sums
from dcpo_kernels.demo.warmup import make_model
from dcpo_kernels.train.rewards import boxed_answer
from dcpo_kernels.train.rollout import decode, encode


def test_sums_are_sums():
    sums = make_sums(200, 4, seed=3)
    assert len({s.text for s in sums}) == 200
    assert sums == make_sums(200, 4, seed=3) != make_sums(200, 4, seed=4)
    for s in sums:
        assert eval(s.text) == s.totals[-1]
        assert all(0 <= total <= LARGEST for total in s.totals)
    with pytest.raises(ValueError, match="there are no 1000 distinct sums of 2 numbers"):
        make_sums(1000, 2, seed=0)


def test_demonstrations_show_every_style():
    generator = random.Random(0)
    (s,) = make_sums(1, 4, seed=0)
    texts = [s.demonstration(generator) for _ in range(2000)]
    unformatted = [t for t in texts if boxed_answer(t) is None]
    worked = [t for t in texts if t.startswith(" ".join(map(str, s.totals)))]
    assert len(unformatted) / 2000 == pytest.approx(STYLES["unformatted"], abs=0.03)
    assert len(worked) / 2000 == pytest.approx(STYLES["worked"], abs=0.03)
    assert all(boxed_answer(t) == str(s.totals[-1]) for t in worked)
    ids = TOKENIZER(texts[0])["input_ids"]
    assert decode(TOKENIZER, [ids]) == [texts[0]]


def test_prompts_go_through_the_chat_template():
    (problem,) = as_problems(make_sums(1, 3, seed=0), 0)
    (ids,) = encode(TOKENIZER, [problem])
    assert TOKENIZER.decode(ids) == f"<|user|> {problem.prompt[0]['content']} <|assistant|>"


@pytest.mark.parametrize("hidden_size", [1, 8, 33, 50, 97])
def test_any_width_makes_a_model(hidden_size):
    make_model(TOKENIZER, hidden_size, layers=1)
