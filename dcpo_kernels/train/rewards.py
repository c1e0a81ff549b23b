"""Rewards by rule: +1 right, 0 wrong, -1 without a final \\boxed{} (DCPO eq. 15)."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

RIGHT, WRONG, UNFORMATTED = 1.0, 0.0, -1.0
MAX_ANSWER = 500  # characters: a policy that rambles must not keep sympy busy
REMEMBERED = 100_000  # verdicts: the same answers come back step after step

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


def at_a_glance(answer: str, ground_truth: str) -> bool | None:
    """Whether two answers are equal; None where math-verify has to decide."""
    if answer == ground_truth:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(ground_truth):
        return int(answer) == int(ground_truth)
    return False if len(answer) > MAX_ANSWER + len(ground_truth) else None


class Judge:
    """The process of judge.py, started when first needed: one for all threads, a batch at a time.

    It ends when its connection closes, so with this process, however that ends.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[tuple[str, str], bool] = {}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the answer of each pair, all different, equals its ground truth by math-verify;
        False too where that takes more time or memory than judge.py allows."""
        with self.lock:
            if len(self.known) > REMEMBERED:
                self.known.clear()
            if new := [pair for pair in pairs if pair not in self.known]:
                judged = zip(new, self._asked(new), strict=True)
                self.known.update(
                    (pair, verdict) for pair, verdict in judged if verdict is not None
                )
            return [self.known.get(pair, False) for pair in pairs]

    def _asked(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        question = json.dumps(pairs).encode()
        for _ in range(2):  # again with a new process, where something ended it
            if self.process is None:
                self._start()
            try:
                self.connection.send_bytes(question)
                return json.loads(self.connection.recv_bytes())
            except (EOFError, ConnectionError):
                self.stop()
            except BaseException:  # Ctrl-C: the answer would be taken for that to the next question
                self.stop()
                raise
        raise RuntimeError("the process that compares answers ended twice; stderr says why")

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        script, descriptor = Path(__file__).with_name("judge.py"), theirs.fileno()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN, script, str(descriptor), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C is not for it
            )

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()
            self.process = None


# Not `python judge.py`: its folder would then come first among those to import from.
_RUN = (
    "import runpy, sys; sys.path[:] = sys.argv[3:]; "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
_judge = Judge()
atexit.register(lambda: _judge.stop())


def _after_fork() -> None:
    """A forked process gets a judge of its own: answers to two would be mixed up."""
    global _judge
    if _judge.process is not None:
        _judge.connection.close()
    _judge = Judge()


os.register_at_fork(after_in_child=_after_fork)


def score(responses: Sequence[str], ground_truths: Sequence[str]) -> list[float]:
    """+1, 0 or -1 for each response's text.

    An answer that math-verify does not manage within half a second of processor time (a tenth in a
    batch that has many such) and a GiB of memory is wrong. The comparisons run in processes of
    their own, as many as there are cores: any thread may call this, and no signal is used here.
    RuntimeError: these processes don't start.
    """
    answers = [boxed_answer(response) for response in responses]
    pairs = list(zip(answers, ground_truths, strict=True))
    equal = {(a, t): at_a_glance(a, t) for a, t in pairs if a is not None}
    unclear = [pair for pair, verdict in equal.items() if verdict is None]
    if unclear:  # else nothing has to wait for another thread's batch
        equal.update(zip(unclear, _judge(unclear), strict=True))
    return [UNFORMATTED if a is None else RIGHT if equal[a, t] else WRONG for a, t in pairs]


def reward(response: str, ground_truth: str) -> float:
    """`score` of one response. Many take less time in one call of `score`, which uses all cores."""
    return score([response], [ground_truth])[0]
