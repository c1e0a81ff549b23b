r"""Rewards by rule: +1 right, 0 wrong, -1 without a final \boxed{}."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcpo_kernels.train import reward, rewards, score
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


def test_long_answers_are_wrong_at_once():
    assert reward(rf"\boxed{{{'1+' * 100_000}1}}", "7") == 0


HOSTILE = [  # sympy does not come back from these, or not in time, or takes all memory
    r"\boxed{10^{10^{10}}}",
    r"\boxed{\frac{1}{9^{9^{9}}}}",
    r"\boxed{10000000!}",
    r"\boxed{\sum_{n=1}^{10^9} \frac1n}",
    r"\boxed{(x+1)^{10000}}",
]


def running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family(pid: int) -> list[int]:
    """A process and those that it started."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def python(code: str) -> subprocess.Popen:
    code = f"import os, signal, threading, time\nfrom dcpo_kernels.train import rewards\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_thread_has_the_limits_too():
    """And the main thread goes on meanwhile: the lock of the interpreter is free."""
    code = f"""
got = []
thread = threading.Thread(target=lambda: got.extend(map(rewards.reward, {HOSTILE}, "77777")))
thread.start()
while thread.is_alive():
    time.sleep(0.01)
got += [rewards.reward(rf"\\boxed{{{{{{x}}}}}}", r"\\frac34") for x in ("0.75", "0.76")]
print(got)
"""
    out, _ = python(code).communicate(timeout=120)
    assert out.split() == ["[0.0,", "0.0,", "0.0,", "0.0,", "0.0,", "1.0,", "0.0]"]


def test_hostile_answers_cost_the_others_nothing():
    responses = [*HOSTILE, r"\boxed{0.75}", *HOSTILE, r"\boxed{0.76}", "0.75", r"\boxed{\frac34}"]
    expected = [*[0] * 5, 1, *[0] * 5, 0, -1, 1]
    assert score(responses, [r"\frac34"] * len(responses)) == expected


def test_the_same_answer_is_judged_once(monkeypatch):
    asked = []
    judge = rewards.Judge()
    monkeypatch.setattr(judge, "_asked", lambda pairs: asked.extend(pairs) or [True] * len(pairs))
    monkeypatch.setattr(rewards, "_judge", judge)
    assert score([r"\boxed{0.5}"] * 512, [r"\frac12"] * 512) == [1] * 512
    assert reward(r"so \boxed{0.5}", r"\frac12") == 1
    assert asked == [("0.5", r"\frac12")]


def test_a_verdict_under_haste_is_not_remembered(monkeypatch):
    """In a batch of many hostile answers the others have less time; alone they get it all."""
    judge = rewards.Judge()
    verdicts = iter([[None, False], [True]])
    monkeypatch.setattr(judge, "_asked", lambda pairs: next(verdicts))
    pairs = [("0.5", r"\frac12"), ("0.6", r"\frac12")]
    assert judge(pairs) == [False, False]
    assert judge(pairs) == [True, False]


def test_an_alarm_of_the_caller_still_rings():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        assert reward(r"\boxed{10^{10^{11}}}", "7") == 0
        wait_until(lambda: rung)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_judge_that_was_killed_is_replaced():
    assert reward(r"\boxed{1.5}", r"\frac32") == 1
    os.kill(rewards._judge.process.pid, signal.SIGKILL)
    assert reward(r"\boxed{2.5}", r"\frac52") == 1


def test_the_judge_is_light():
    assert reward(r"\boxed{3.5}", r"\frac72") == 1
    mapped = Path(f"/proc/{rewards._judge.process.pid}/maps").read_text()
    assert "libpython" in mapped or "python" in mapped
    assert "torch" not in mapped and "libgomp" not in mapped


@pytest.mark.parametrize("how", ["killed", "exits", "busy"])
def test_no_process_is_left(how):
    code = f"""
rewards.reward(r"\\boxed{{0.5}}", r"\\frac12")
if {how == "busy"}:
    threading.Thread(target=rewards.reward, args=({HOSTILE[0]!r}, "7"), daemon=True).start()
    time.sleep(0.1)
print(rewards._judge.process.pid, flush=True)
if {how != "exits"}:
    time.sleep(600)
"""
    process = python(code)
    assert process.stdout is not None
    judge = int(process.stdout.readline())
    started = family(judge)
    if how != "exits":
        assert running(judge)
        process.kill()
    process.wait()
    wait_until(lambda: not any(map(running, started)))
    process.stdout.close()


def test_a_fork_has_its_own_judge():
    """Two processes at one connection would read each other's verdicts."""
    code = r"""
rewards.reward(r"\boxed{0.5}", r"\frac12")
before = rewards._judge.process.pid
child = os.fork()
right = [
    rewards.reward(rf"\boxed{{{i}.5}}", rf"\frac{{{2 * i + (child == 0)}}}{2}") for i in range(9)
]
print(right, rewards._judge.process.pid == before, flush=True)
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""
    out, _ = python(code).communicate(timeout=120)
    assert sorted(out.splitlines()) == [f"{[0.0] * 9} True", f"{[1.0] * 9} False"]


def test_ctrl_c_while_it_judges():
    """The next question gets its own answer."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            score([rf"\boxed{{10^{{10^{{{i}}}}}}}" for i in range(12, 100)], ["7"] * 88)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert reward(r"\boxed{4.5}", r"\frac92") == 1
