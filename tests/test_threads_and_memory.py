"""What the compiled kernels take from the machine: memory, threads, and the rows they look at."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from backends import CPU, needs_kernels, on_backends
from torch.profiler import ProfilerActivity, profile

import dcpo_kernels as dk
from dcpo_kernels.backends import _compiled

pytestmark = needs_kernels
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def python(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter; the test fails with its error if it dies of a signal too."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# ---- memory -------------------------------------------------------------------------------------


def peak(run) -> int:
    """Most bytes of CPU tensors that were alive at once during run(), beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


ROWS, VOCAB = 64, 50_000


def step(name, layout, **options):
    """One loss with its backward, on logits that were just made."""
    shape = (ROWS, VOCAB) if layout == "packed" else (4, ROWS // 4, VOCAB)
    logits = torch.randn(shape).bfloat16().requires_grad_() * 1
    ids, old = torch.zeros(shape[:-1]).long(), torch.full(shape[:-1], -9.0)
    grouping = {"lengths": [16] * 4} if layout == "packed" else {"mask": torch.ones(shape[:-1])}
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))

    def run():
        if name == "selected":
            out, _ = dk.selected_logprobs(logits, ids, with_entropy=True, **options)
            loss = 0.3 * out.sum()
        else:
            objective = getattr(dk, name)(entropy_coef=0.01)
            rest = {"objective": objective, **grouping, **options}
            loss = 0.3 * dk.policy_loss(logits, ids, old, torch.ones(4), **rest).loss
        torch.autograd.grad(loss, logits)

    return run, logits, seen


@on_backends(*CPU[:1])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "selected"])
def test_in_place_takes_below_1_percent_of_the_logits(name, layout, use_backend):
    run, logits, seen = step(name, layout, inplace=True, backend=use_backend)
    assert peak(run) < 0.01 * logits.nbytes
    assert seen == [logits.data_ptr()]  # the gradient is where the logits were
    run, logits, _ = step(name, layout, backend=use_backend)
    assert logits.nbytes <= peak(run) < 1.01 * logits.nbytes  # what was counted is memory


@on_backends(*CPU[:1])
def test_evaluation_makes_no_gradient(use_backend):
    logits = torch.randn(ROWS, VOCAB, requires_grad=True)
    ids, old, A = torch.zeros(ROWS).long(), torch.full((ROWS,), -9.0), torch.ones(4)
    with torch.no_grad():
        assert peak(lambda: dk.selected_logprobs(logits, ids, backend=use_backend)) < 20_000
        rest = {"lengths": [16] * 4, "backend": use_backend}
        assert peak(lambda: dk.policy_loss(logits, ids, old, A, **rest)) < 20_000


# ---- rows that don't count are not read ---------------------------------------------------------

GUARDED = """
import ctypes, mmap, sys
import torch
import dcpo_kernels as dk
from dcpo_kernels.backends import _compiled

page, rows = mmap.PAGESIZE, 6
vocab = page // 2  # a row of bfloat16 is a page
memory = mmap.mmap(-1, rows * page)
logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, rows, vocab)
logits.copy_(torch.randn(1, rows, vocab))
counts = torch.tensor([[1, 0, 1, 0, 0, 1]])
advantages = torch.tensor([[1.0, 2.0, 0.0, 0.0, -1.0, -2.0]])

def protect(closed, how):
    libc = ctypes.CDLL(None, use_errno=True)
    for row in closed[0].nonzero()[:, 0].tolist():
        address = ctypes.c_void_p(logits.data_ptr() + row * page)
        assert libc.mprotect(address, page, how) == 0, ctypes.get_errno()

def run(name, logits):
    ids = torch.where(counts == 0, -100, 5)
    logits = logits.detach().requires_grad_()
    if name == "selected":
        out = dk.selected_logprobs(logits, ids, mask=counts, with_entropy=True)
        loss = out[0].sum() + out[1].sum()
    else:
        objective = dk.gspo() if name == "gspo" else dk.dcpo()
        out = dk.policy_loss(
            logits, ids, torch.full((1, rows), -7.0), advantages, mask=counts,
            objective=objective, skip_zero_advantage=name == "skip",
        )
        loss, out = out.loss, out[1:3]
    return [loss.detach(), *out, *torch.autograd.grad(loss, logits)]

if sys.argv[1] == "read":
    protect(counts == 0, 0)
    print(float(logits.float().sum()))
_compiled.C.cpu_use_isa(sys.argv[1])
for name in ("dcpo", "gspo", "skip", "selected"):
    closed = (counts == 0) | (advantages == 0) if name == "skip" else counts == 0
    protect(closed, 0)
    found = run(name, logits)
    with torch.no_grad():
        read_only = dk.selected_logprobs(logits, counts * 5, mask=~closed)[0]
    protect(closed, mmap.PROT_READ | mmap.PROT_WRITE)
    assert torch.equal(read_only[~closed], dk.selected_logprobs(logits, counts * 5)[0][~closed])
    for one, two in zip(found, run(name, logits), strict=True):
        assert torch.equal(one, two), name
    print(name)
"""


@linux
@pytest.mark.skipif(mmap.PAGESIZE > 65536, reason="a row would be too long")
@pytest.mark.parametrize("name", CPU)
def test_rows_that_do_not_count_are_not_read(name):
    """They lie in memory that may not be read: reading them ends the process."""
    isa = name.removeprefix("cpu-")
    assert python(GUARDED, isa).split() == ["dcpo", "gspo", "skip", "selected"]


@linux
def test_the_guard_guards():
    command = [sys.executable, "-c", GUARDED, "read"]
    assert subprocess.run(command, capture_output=True).returncode < 0


@on_backends(*CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [64, 2048, 67, 2049 + 32])
def test_nothing_is_read_past_the_last_row(vocab, dtype, use_backend):
    """A view that ends with its memory, with NaN in front: what is read beside a row shows."""
    memory = torch.full((vocab * 3 + 7,), torch.nan, dtype=dtype)
    logits = memory[7:].view(3, vocab)
    logits.copy_(torch.randn(3, vocab))
    for row in range(3):
        one = logits[row : row + 1]
        found = dk.selected_logprobs(one, torch.tensor([1]), backend=use_backend)[0]
        assert torch.equal(
            found, dk.selected_logprobs(one.clone(), torch.tensor([1]), backend=use_backend)[0]
        )


# ---- threads ------------------------------------------------------------------------------------


@linux
def test_no_openmp_and_no_torch_in_the_compiled_module():
    """torch brings an OpenMP of its own; a second pool beside it would fight for the cores."""
    maps = python(
        """
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("dcpo_kernels._C", sys.argv[1])
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert "torch" not in sys.modules
        print(open("/proc/self/maps").read())
        """,
        _compiled.C.__file__,
    )
    libraries = {line.split("/", 1)[1] for line in maps.splitlines() if ".so" in line}
    assert any(name.endswith(Path(_compiled.C.__file__).name) for name in libraries)
    for word in ("omp", "torch", "tbb", "mkl", "libcuda", "cudart"):
        assert not [name for name in libraries if word in Path(name).name]


COUNT_THREADS = """
import os, threading
import torch
import dcpo_kernels as dk

torch.set_num_threads(1)
logits = torch.randn(64, 100_000)
ids = torch.zeros(64).long()
watching, most = True, {}

def watch():
    while watching:
        threads = len(os.listdir("/proc/self/task"))
        most[wanted] = max(most.get(wanted, 0), threads)

wanted = 1
dk.selected_logprobs(logits, ids)
watcher = threading.Thread(target=watch)
watcher.start()
for wanted in (1, 2, 4):
    torch.set_num_threads(wanted)
    for attempt in range(300):
        dk.selected_logprobs(logits, ids)
        if attempt > 10 and most[wanted] - most[1] >= wanted - 1:
            break
watching = False
watcher.join()
print(*(most[wanted] - most[1] for wanted in (1, 2, 4)))
"""


@linux
def test_threads_are_those_of_torch():
    """One, two and four of them at work, counted while they are."""
    assert python(COUNT_THREADS).split() == ["0", "1", "3"]


@linux
@pytest.mark.parametrize("called", [True, False])
def test_after_a_fork(called):
    """No pool is left behind for a child to wait for: neither ours, nor torch's where ours was
    never called."""
    code = """
        import os, signal, sys
        import torch
        import dcpo_kernels as dk
        torch.set_num_threads(3)
        logits, ids = torch.randn(64, 50_000), torch.zeros(64).long()
        expected = torch.log_softmax(logits, -1)[:, 0]
        if sys.argv[1] == "True":
            expected = dk.selected_logprobs(logits, ids)[0]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            off = (dk.selected_logprobs(logits, ids)[0] - expected).abs().max()
            os._exit(0 if off == 0 or (sys.argv[1] == "False" and off < 1e-5) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    assert python(code, str(called)) == "0\n"


@linux
def test_a_small_batch_takes_one_thread():
    """A call and its backward start no thread: where another process has the other cores, waiting
    for them takes a hundred times as long as the work."""
    code = """
        import os
        import torch
        import dcpo_kernels as dk
        torch.set_num_threads(4)
        logits, ids = torch.randn(64, 1000).requires_grad_(), torch.zeros(64).long()
        old, A = torch.full((64,), -7.0), torch.ones(8)
        before = len(os.listdir("/proc/self/task"))
        for options in ({"lengths": [8] * 8}, {"lengths": [8] * 8, "objective": dk.gspo()}):
            out = dk.policy_loss(logits, ids, old, A, **options)
            torch.autograd.grad(0.5 * out.loss, logits)
        torch.autograd.grad(0.5 * dk.selected_logprobs(logits, ids)[0].sum(), logits)
        print(len(os.listdir("/proc/self/task")) - before)
        """
    assert python(code) == "0\n"


@on_backends(*CPU)
def test_called_from_several_threads_at_once(use_backend):
    from concurrent.futures import ThreadPoolExecutor

    batches = [torch.randn(40, 9000) for _ in range(6)]
    ids = torch.zeros(40).long()

    def run(logits):
        return dk.selected_logprobs(logits, ids, with_entropy=True, backend=use_backend)

    expected = [run(logits) for logits in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for found, want in zip(pool.map(run, batches), expected, strict=True):
                assert all(map(torch.equal, found, want))


def test_instruction_sets():
    before, isas = _compiled.C.cpu_isa(), _compiled.C.cpu_isas()
    assert isas[-1] == "portable" and before in isas
    with pytest.raises(ValueError, match="instruction set 'sse9' is not available here; there is"):
        _compiled.C.cpu_use_isa("sse9")
    assert _compiled.C.cpu_isa() == before


def test_instruction_set_from_the_environment():
    code = """
        import os
        import sys
        os.environ["DCPO_KERNELS_CPU_ISA"] = sys.argv[1]
        import torch, dcpo_kernels
        from dcpo_kernels.backends import _compiled
        dcpo_kernels.selected_logprobs(torch.zeros(1, 2), torch.tensor([0]))
        print(_compiled.C.cpu_isa())
        """
    assert python(code, "portable") == "portable\n"
