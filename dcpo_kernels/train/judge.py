r"""The judge: a process of its own, where math-verify compares answers and none can do harm.

One answer (10^{10^{10}}) can keep sympy busy for ever, inside a call that no thread and no signal
handler of Python's interrupts, or take all memory. So each pair is compared in a worker of its own,
with limits that the kernel enforces. This process forks them: rewards.py runs it as a script that
imports neither torch nor this package and has no threads, so a fork is safe and takes milliseconds.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection, wait

from math_verify import parse, verify

SECONDS = 0.5  # of processor time per answer: ten times what most take
# Once this many answers of a batch met the limit, the others have less time.
SLOW, SECONDS_LEFT = 16, 0.1
MEMORY = 1 << 30  # bytes of address space; a worker starts with 70 MB
STUCK = 30.0  # seconds without an answer from any worker: they are deadlocked
WORKERS = min(16, len(os.sched_getaffinity(0)))

# Brings math-verify's caches in place before the first fork.
USUAL = [
    (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"[1, 2)", r"1 \le x < 2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\{1, 2\}"),
    (r"\text{B}", r"\log_2 8"),
]


def equal(answer: str, ground_truth: str) -> bool:
    """Whether math-verify takes two answers for the same."""
    # Its own timeouts are alarms: they would not interrupt one long operation, our limits do.
    gold, given = (
        parse(f"\\boxed{{{x}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for x in (ground_truth, answer)
    )
    return verify(gold, given, timeout_seconds=None)


def compare(
    result: Connection, inherited: list[Connection], pair: list[str], seconds: float
) -> None:
    """In a worker: sends the verdict on a pair, or is ended by a limit before it can."""
    for other in inherited:  # copies held open here would hide that the other end is gone
        other.close()
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(quiet, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, whatever that is doing
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.setitimer(signal.ITIMER_PROF, seconds)
    result.send(equal(*pair))


def judge(client: Connection, pairs: list[list[str]]) -> list[bool | None]:
    """Whether the answers of each pair are equal: False where the worker died, None where it had
    less time than usual.

    A worker for each pair: what was compared before decides nothing, and what sympy remembers goes.
    EOFError: the client is gone.
    """
    verdicts: list[bool | None] = [False] * len(pairs)
    waiting = list(range(len(pairs)))
    workers: dict[Connection, tuple[multiprocessing.Process, int, float]] = {}
    died = 0
    while waiting or workers:
        while waiting and len(workers) < WORKERS:
            i = waiting.pop()
            result, theirs = multiprocessing.Pipe(duplex=False)
            seconds = SECONDS if died < SLOW else SECONDS_LEFT
            arguments = (theirs, [client, result, *workers], pairs[i], seconds)
            process = multiprocessing.Process(target=compare, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers[result] = process, i, seconds
        ready = wait([client, *workers], STUCK)
        if client in ready:  # its connection was closed: while it waits it sends nothing
            raise EOFError
        for result in [w for w in workers if w in ready or not ready]:
            process, i, seconds = workers.pop(result)
            try:
                verdicts[i] = bool(ready) and result.recv()
            except (EOFError, OSError):
                died += 1
                verdicts[i] = None if seconds < SECONDS else False
            result.close()
            process.kill()
            process.join()
    return verdicts


def main() -> None:
    """Batches of pairs in, verdicts out, as JSON, until the other side closes."""
    client = Connection(int(sys.argv[2]))
    multiprocessing.set_start_method("fork")
    logging.disable()  # math-verify warns of every answer that it can't parse
    for pair in USUAL:
        equal(*pair)
    try:
        while True:
            client.send_bytes(json.dumps(judge(client, json.loads(client.recv_bytes()))).encode())
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    main()
