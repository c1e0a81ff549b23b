"""Rewards by rule: +1 right, 0 wrong, -1 without a final \\boxed{} (DCPO eq. 15)."""

from __future__ import annotations

import re
import threading

from math_verify import parse, verify

RIGHT, WRONG, UNFORMATTED = 1.0, 0.0, -1.0
TIMEOUT = 3  # seconds, the official code's
MAX_ANSWER = 500  # characters: a policy that rambles must not keep sympy busy

_BOX = re.compile(r"\\boxed\s*\{")
_INTEGER = re.compile(r"[+-]?\d{1,18}")


def boxed_answer(text: str) -> str | None:
    """What the last \\boxed{} holds; None without one, or if it is empty or never closes."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = i = boxes[-1].end()
    depth = 1
    while i < len(text) and depth:
        if text[i] == "\\":
            i += 2  # an escaped brace, as in \{1, 2\}, opens and closes nothing
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
    return text[start : i - 1].strip() or None if depth == 0 else None


def same_answer(answer: str, ground_truth: str) -> bool:
    """Whether two answers are mathematically equal, by math-verify where a glance doesn't tell."""
    if answer == ground_truth:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(ground_truth):
        return int(answer) == int(ground_truth)
    if len(answer) > MAX_ANSWER + len(ground_truth):
        return False
    # Its timeouts are alarms, which only the main thread may set.
    timeout = TIMEOUT if threading.current_thread() is threading.main_thread() else None
    gold, given = (
        parse(f"\\boxed{{{x}}}", parsing_timeout=timeout)  # pyright: ignore[reportArgumentType]
        for x in (ground_truth, answer)
    )
    return verify(gold, given, timeout_seconds=timeout)


def reward(response: str, ground_truth: str) -> float:
    """+1, 0 or -1 for a response's text."""
    answer = boxed_answer(response)
    if answer is None:
        return UNFORMATTED
    return RIGHT if same_answer(answer, ground_truth) else WRONG
