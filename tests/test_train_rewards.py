r"""Rewards by rule: +1 right, 0 wrong, -1 without a final \boxed{}."""

from __future__ import annotations

import threading

import pytest

from dcpo_kernels.train import reward
from dcpo_kernels.train.rewards import boxed_answer

CASES = [
    # response, ground truth, reward
    (r"\boxed{17}", "17", 1),
    (r"15 12 21 \boxed{ 21 }", "21", 1),
    (r"\boxed{18}", "17", 0),
    (r"\boxed{-3}", "-3", 1),
    (r"\boxed{+3}", "3", 1),
    (r"\boxed{007}", "7", 1),
    (r"\boxed{7.0}", "7", 1),
    # the last one counts
    (r"\boxed{17}, no: \boxed{18}", "17", 0),
    (r"\boxed{18}, no: \boxed{17}.", "17", 1),
    # braces inside
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}", 1),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1),
    (r"\boxed{\left\{1\right\}}", r"\{1\}", 1),
    # equal as numbers
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{\dfrac12}", "0.5", 1),
    (r"\boxed{1,000}", "1000", 1),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{0.33}", r"\frac{1}{3}", 0),
    (r"\boxed{(1, 2)}", "(1,2)", 1),
    (r"\boxed{(2, 1)}", "(1,2)", 0),
    # formatted, and no number
    (r"\boxed{seven}", "7", 0),
    (r"\boxed{7 7}", "7", 0),
    (r"\boxed{\text{B}}", "B", 1),
    (r"\boxed{\frac{1}{}", "7", -1),
    # unformatted
    ("17", "17", -1),
    ("", "17", -1),
    (r"\boxed", "17", -1),
    (r"\boxed{}", "17", -1),
    (r"\boxed{ }", "17", -1),
    (r"\boxed{17", "17", -1),
    (r"\boxed{17} and \boxed{17", "17", -1),
    (r"boxed{17}", "17", -1),
]


@pytest.mark.parametrize(("response", "ground_truth", "expected"), CASES)
def test_reward(response, ground_truth, expected):
    assert reward(response, ground_truth) == expected


def test_boxed_answer_keeps_what_is_inside():
    assert boxed_answer(r"a \boxed {f(\{1\}, {2})} b }") == r"f(\{1\}, {2})"
    assert boxed_answer("\\boxed{trailing backslash\\") is None


def test_in_a_thread():
    """math-verify's timeouts are alarms, which fail outside the main thread."""
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(reward(rf"\boxed{{{x}}}", r"\frac34") for x in ("0.75", "0.76"))
    )
    thread.start()
    thread.join()
    assert got == [1, 0]


def test_long_answers_are_wrong_at_once():
    assert reward(rf"\boxed{{{'1+' * 100_000}1}}", "7") == 0
