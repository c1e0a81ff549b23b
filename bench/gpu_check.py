"""Everything that only a GPU can say of the kernels: `python bench/gpu_check.py OUT.json`.

Run it from the checkout on a machine with a GPU; it needs no network and at most nine minutes. Each
section is a process of its own with a limit of its own, so that a failure, a hang or a broken CUDA
context costs nothing but that section. OUT.json is rewritten after every section.

bytes: the floor of a fused loss with gradient is 4 a bf16 logit (read once, written once), over the
bandwidth of a device-to-device copy measured in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 525.0  # seconds for all sections
SECTIONS: dict[str, tuple[float, Callable[[], Any]]] = {}


def section(seconds: float):
    def register(run: Callable[[], Any]) -> Callable[[], Any]:
        SECTIONS[run.__name__] = (seconds, run)
        return run

    return register


def output(*command: object, seconds: float = 60.0, **env: str) -> dict[str, Any]:
    """Exit status, time and the end of what a command says."""
    start = time.time()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    return {
        "status": done.returncode,
        "seconds": round(time.time() - start, 1),
        "output": done.stdout[-4000:],
    }


# ---- sections, in order -------------------------------------------------------------------------


@section(30)
def environment() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory": properties.total_memory,
    }
    for name in ("triton", "liger_kernel", "pybind11"):
        try:
            found[name] = getattr(__import__(name), "__version__", "present")
        except ImportError as error:
            found[name] = f"missing: {error}"
    for name, command in {
        "smi": "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,"
        "clocks_throttle_reasons.active,power.limit,temperature.gpu --format=csv",
        "nvcc": "nvcc --version",
        "commit": "git rev-parse HEAD",
        "changed": "git status --short",
    }.items():
        try:
            found[name] = output(*command.split())["output"].strip()
        except OSError as error:
            found[name] = str(error)
    return found


@section(150)
def build() -> dict[str, Any]:
    done = output(
        *(sys.executable, "setup.py", "build_ext", "--inplace"),
        seconds=140,
        DCPO_CUDA="ON",
        DCPO_CUDA_ARCHS=os.environ.get("DCPO_CUDA_ARCHS", "native"),
    )
    if done["status"]:
        raise RuntimeError(done["output"])
    done["info"] = output(sys.executable, "-m", "dcpo_kernels.cli", "info")["output"]
    return done


class Rows:
    """Arguments of the operators for random rows."""

    def __init__(self, rows: int, vocab: int, dtype: str = "bfloat16", odd_stride: int = 0):
        import torch

        self.torch, self.rows, self.vocab = torch, rows, vocab
        draw = torch.Generator("cuda").manual_seed(0)
        memory = torch.empty(rows, vocab + odd_stride, dtype=getattr(torch, dtype), device="cuda")
        self.logits = memory[:, :vocab]
        for part in self.logits.split(1024):
            part.copy_(2 * torch.randn(part.shape, generator=draw, device="cuda"))
        self.ids = torch.randint(0, vocab, (rows,), generator=draw, device="cuda")
        self.advantages = torch.randn(rows, generator=draw, device="cuda")
        self.old = torch.empty(rows, device="cuda")
        for i in range(0, rows, 512):
            part = slice(i, i + 512)
            logp = torch.log_softmax(self.logits[part].float(), -1)
            self.old[part] = logp.gather(1, self.ids[part, None])[:, 0]
        self.old += 0.1 * torch.randn(rows, generator=draw, device="cuda")
        self.weights = torch.full((rows,), 1 / rows, device="cuda")

    def arguments(self, entropy: bool = False, skip: bool = False) -> tuple:
        import dcpo_kernels as dk
        from dcpo_kernels.objectives import kernel_arguments

        scalars = (self.ids, self.old, self.advantages, self.weights)
        return (*scalars, *[None] * 5, *kernel_arguments(dk.dcpo()), 1.0, entropy, skip)


def worst(found: Any, wanted: Any) -> float:
    """The largest error of a gradient, over the largest entry of its row."""
    error = (found.double() - wanted.double()).abs().amax(-1)
    return float((error / wanted.double().abs().amax(-1).clamp(min=1e-30)).max())


@section(60)
def correct() -> list[dict[str, Any]]:
    """Every kernel and cluster size against PyTorch in float64, functional and in place."""
    import torch

    import dcpo_kernels as dk
    from dcpo_kernels.backends import cuda

    results = []
    for dtype, bound in (("float32", 5e-6), ("float16", 2e-3), ("bfloat16", 8e-3)):
        for vocab in (1003, 32000, 50257, 128256, 151936):
            r = Rows(300 if vocab < 100000 else 140, vocab, dtype)
            logits = r.logits.double().requires_grad_()

            def loss(x, backend, r=r, **options):
                return dk.policy_loss(
                    x, r.ids, r.old, r.advantages, lengths=[r.rows], with_entropy=True,
                    objective=dk.dcpo(entropy_coef=0.01), backend=backend, **options,
                )  # fmt: skip

            want = loss(logits, "reference")
            want.loss.backward()
            for cluster in (-1, 0, 1, 2, 4, 8):
                cuda.cluster = cluster
                for inplace in (False, True):
                    leaf = r.logits.clone().requires_grad_()
                    out = loss(leaf.view_as(leaf), "cuda", inplace=inplace)
                    out.loss.backward()
                    row = {"dtype": dtype, "vocab": vocab, "cluster": cluster, "inplace": inplace}
                    row["gradient_error"] = worst(leaf.grad, logits.grad)
                    row["logprob_error"] = float((out.logprobs - want.logprobs).abs().max())
                    row["ok"] = row["gradient_error"] < bound and row["logprob_error"] < 1e-5
                    row["ok"] &= torch.equal(out.clipped, want.clipped)
                    results.append(row)
            cuda.cluster = -1
    return results


def clock(run: Callable[[], Any], before: Callable[[], Any] | None = None, seconds: float = 0.7):
    """Median and spread, in ms, of what `run` takes on the device; `before` is not timed."""
    import torch

    for _ in range(3):
        if before:
            before()
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.time()
    while len(times) < 10 or (time.time() - start < seconds and len(times) < 200):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        if before:
            before()
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]))
    times.sort()
    return {
        "ms": statistics.median(times),
        "fastest": times[0],
        "p90": times[len(times) * 9 // 10],
        "runs": len(times),
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the device."""
    import torch

    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / clock(lambda: b.copy_(a))["ms"] * 1e3


def plain(logits, ids, old, advantages, weights):
    """The loss as one would write it in PyTorch."""
    import torch

    logp = torch.log_softmax(logits.float(), -1).gather(1, ids[:, None])[:, 0]
    q = old.exp()
    low = 0.5 + 0.5 * (1 - 4 * 0.16 / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 4 * 0.2 / q).sqrt()).clamp(max=10.0)
    ratio = (logp - old).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * 10.0), loss)
    return (loss * weights).sum()


def attempt(rows: list, entry: dict[str, Any], bandwidth: float, bytes_: float, measure) -> None:
    import torch

    try:
        entry |= measure()
        entry["share_of_copy"] = bytes_ / (entry["ms"] * 1e-3) / bandwidth
    except Exception as error:  # an implementation that fails costs its own row
        entry["error"] = f"{type(error).__name__}: {error}"[:500]
        torch.cuda.empty_cache()
    rows.append(entry)


@section(150)
def speed() -> dict[str, Any]:
    import torch

    from dcpo_kernels import backends, ops
    from dcpo_kernels.backends import cuda

    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    there = [name for name in ("cuda", "triton") if not backends.unavailable(name, "cuda")]
    shapes = [(4096, 151936), (8192, 128256), (16384, 32000)]
    for n, vocab in shapes:
        r = Rows(n, vocab)
        master, size = r.logits.clone(), r.logits.nbytes
        base = {"rows": n, "vocab": vocab}

        def restore(r=r, master=master):
            r.logits.copy_(master)

        for name in there:
            arguments, with_entropy = r.arguments(), r.arguments(True)
            cases = {
                "fused, in place": (2, restore, lambda a=arguments, r=r, b=name: ops.fused_(
                    r.logits, *a, b)),
                "fused": (2, None, lambda a=arguments, m=master, b=name: ops.fused(
                    m, *a, True, b)),
                "read only": (1, None, lambda r=r, m=master, b=name: ops.row_stats(
                    m, r.ids, None, 1.0, False, b)),
                "read only, entropy": (1, None, lambda r=r, m=master, b=name: ops.row_stats(
                    m, r.ids, None, 1.0, True, b)),
                "fused, entropy, in place": (2, restore, lambda a=with_entropy, r=r,
                    b=name: ops.fused_(r.logits, *a, b)),
            }  # fmt: skip
            stats = ops.row_stats(master, r.ids, None, 1.0, True, name)
            cases["gradient alone"] = (2, None, lambda r=r, m=master, s=stats, b=name:
                ops.row_gradient(m, r.ids, s[2], s[3], s[1], r.weights, None, 1.0, b))  # fmt: skip
            for what, (passes, before, run) in cases.items():
                entry = {**base, "backend": name, "what": what}
                attempt(
                    rows, entry, bandwidth, passes * size,
                    lambda run=run, before=before: clock(run, before),
                )  # fmt: skip
            halved = r.advantages.clone()
            r.advantages[: n // 2] = 0
            skipping = r.arguments(skip=True)
            entry = {**base, "backend": name, "what": "fused, in place, half skipped"}
            attempt(
                rows, entry, bandwidth, 1.5 * size,
                lambda r=r, a=skipping, b=name, f=restore: clock(
                    lambda: ops.fused_(r.logits, *a, b), f),
            )  # fmt: skip
            r.advantages = halved

        restore()
        for cluster in (0, 1, 2, 4, 8) if "cuda" in there else ():
            cuda.cluster = cluster
            entry = {**base, "backend": "cuda", "what": f"fused, in place, cluster {cluster}"}
            plan = cuda.C.cuda_plan(vocab * 2, 9, 232448)
            entry["by_the_table"] = plan["cluster"]
            attempt(
                rows, entry, bandwidth, 2 * size,
                lambda r=r, f=restore: clock(lambda: ops.fused_(r.logits, *r.arguments(), "cuda"),
                                             f),
            )  # fmt: skip
            cuda.cluster = -1

        leaf = master.requires_grad_()
        scalars = (r.ids, r.old, r.advantages, r.weights)

        def forward_backward(loss, leaf=leaf, scalars=scalars):
            leaf.grad = None
            loss(leaf, *scalars).backward()

        entry = {**base, "backend": "torch.compile", "what": "forward and backward"}
        compiled = torch.compile(plain)
        attempt(
            rows, entry, bandwidth, 2 * size,
            lambda f=forward_backward, c=compiled: clock(lambda: f(c), seconds=0.5),
        )  # fmt: skip
        entry = {**base, "backend": "eager", "what": "forward and backward"}
        attempt(
            rows, entry, bandwidth, 2 * size,
            lambda f=forward_backward: clock(lambda: f(plain), seconds=0.5),
        )  # fmt: skip
        entry = {**base, "backend": "liger", "what": "forward and backward"}
        attempt(rows, entry, bandwidth, 2 * size, lambda r=r, leaf=leaf: liger(r, leaf))
        del r, master, leaf, restore, forward_backward, scalars
        arguments = with_entropy = cases = stats = skipping = None
        torch.cuda.empty_cache()

    flat = []
    for n in (1024, 4096, 16384, 65536):
        r = Rows(n, 32000)
        timing = clock(lambda r=r: ops.fused_(r.logits, *r.arguments(), "cuda"), seconds=0.3)
        flat.append({"rows": n, "vocab": 32000, **timing, "us_a_row": timing["ms"] * 1e3 / n})
        del r
        torch.cuda.empty_cache()
    return {"copy_bytes_a_second": bandwidth, "rows": rows, "flat": flat}


def liger(r: Rows, leaf):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    # [B, T + 1, V]: their layout; the last position of a row predicts nothing
    logits = leaf[None]

    def run():
        leaf.grad = None
        loss, *_ = triton_grpo_loss(
            logits, r.old[None, :-1], None, r.ids[None, :-1], r.advantages[:1],
            temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, inplace=False,
        )  # fmt: skip
        loss.sum().backward()

    return clock(run, seconds=0.5)


@section(40)
def graph() -> dict[str, Any]:
    """A captured launch gives the bits of a plain one, with new data too."""
    import torch

    from dcpo_kernels import backends, ops

    assert not backends.unavailable("cuda", "cuda")  # as policy_loss asks; readies the kernels
    results = {}
    for vocab in (32000, 50257, 151936):
        r = Rows(512, vocab)
        a = r.arguments(entropy=True)

        def everything(r=r, a=a):
            fused = ops.fused(r.logits, *a, True, "cuda")
            stats = ops.row_stats(r.logits, r.ids, None, 1.0, True, "cuda")
            ops.scale_(fused[-1], r.scale, "cuda")
            return (*fused, *stats)

        r.scale = torch.tensor(0.5, device="cuda")
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):  # the first use of the kernels for this vocabulary
            static = everything()
        same = []
        for _ in range(3):
            r.logits.mul_(-0.9)
            captured.replay()
            plain_results = everything()
            same.append(all(map(torch.equal, static, plain_results)))
        results[str(vocab)] = same
    if not all(map(all, results.values())):
        raise AssertionError(results)
    return results


@section(40)
def streams() -> dict[str, Any]:
    """Two streams at once, fifty times: always the bits of one alone."""
    import torch

    from dcpo_kernels import ops

    both = [Rows(600, 151936), Rows(2000, 32000)]
    wanted = [ops.fused(r.logits, *r.arguments(True), True, "cuda") for r in both]
    torch.cuda.synchronize()
    queues = [torch.cuda.Stream() for _ in both]
    bad = 0
    for _ in range(50):
        found = []
        for queue, r in zip(queues, both, strict=True):
            with torch.cuda.stream(queue):
                found.append(ops.fused(r.logits, *r.arguments(True), True, "cuda"))
        torch.cuda.synchronize()
        bad += not all(
            torch.equal(x, y)
            for one, other in zip(found, wanted, strict=True)
            for x, y in zip(one, other, strict=True)
        )
    if bad:
        raise AssertionError(f"{bad} of 50 runs differ")
    return {"runs": 50, "differ": 0}


@section(130)
def tests() -> dict[str, Any]:
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    done = output(
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail", "10", "--no-header"),
        *workers,
        "tests",
        seconds=120,
    )
    if done["status"]:
        raise RuntimeError(done["output"])
    return done


def small() -> None:
    """What the sanitizers watch: every kernel, every cluster size, rows that end oddly."""
    import torch

    from dcpo_kernels import ops
    from dcpo_kernels.backends import cuda

    for dtype in ("bfloat16", "float32"):
        for vocab, clusters in ((1003, (0,)), (33288, (0, 1, 2)), (70008, (4, 8))):
            r = Rows(5, vocab, dtype)
            r.weights[1] = 0
            for cluster in clusters:
                cuda.cluster = cluster
                ops.fused(r.logits, *r.arguments(True), True, "cuda")
                ops.fused_(r.logits.clone(), *r.arguments(), "cuda")
            s = ops.row_stats(r.logits, r.ids, None, 1.0, True, "cuda")
            ops.row_gradient(r.logits, r.ids, s[2], s[3], s[1], r.weights, r.weights, 1.0, "cuda")
            ops.scale_(r.logits, torch.tensor(2.0, device="cuda"), "cuda")
    torch.cuda.synchronize()


@section(160)
def sanitizers() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"missing": "compute-sanitizer"}
    results = {}
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        try:
            results[name] = output(
                *(tool, "--tool", name, "--error-exitcode", "9", "--kernel-regex"),
                "kernel_substring=dcpo",
                *(sys.executable, __file__, "--run", "small"),
                seconds=60,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
        except subprocess.TimeoutExpired:
            results[name] = {"status": "timeout"}
    bad = [name for name, result in results.items() if result["status"] not in (0, "timeout")]
    return {"failed": bad, **results}


def one_launch() -> None:
    from dcpo_kernels import ops

    r = Rows(4096, 151936)
    for _ in range(3):
        for backend in ("cuda", "triton"):
            ops.fused_(r.logits, *r.arguments(), backend)
            ops.row_stats(r.logits, r.ids, None, 1.0, False, backend)
    r.torch.cuda.synchronize()


@section(80)
def ncu() -> dict[str, Any]:
    """Bytes that went to and from device memory, and what the multiprocessors were busy with, of
    the cuda backend's two kernels and then of Triton's."""
    if shutil.which("ncu") is None:
        return {"missing": "ncu"}
    metrics = [
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        "dram__bytes_write.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "smsp__warps_active.avg.pct_of_peak_sustained_active",
    ]
    return output(
        *("ncu", "--clock-control", "none", "--metrics", ",".join(metrics), "--kernel-name"),
        *("regex:fused|row_stats", "--launch-skip", "4"),
        *("--launch-count", "4", sys.executable, __file__, "--run", "one_launch"),
        seconds=75,
    )


@section(110)
def launches() -> dict[str, Any]:
    """Triton's fused kernel launched otherwise than by its table, beside what the model expects."""
    from dcpo_kernels import ops
    from dcpo_kernels.backends import triton
    from dcpo_kernels.bench import launches as model

    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for dtype, vocab in (
        *(("bfloat16", vocab) for vocab in (8192, 32000, 65536, 102400, 128256, 151936)),
        ("float32", 32000),
        ("float32", 128256),
    ):
        r = Rows(max(512, (1 << 28) // vocab), vocab, dtype)
        device = triton._device(0)
        gpu = model.Gpu(device.multiprocessors, device.l2_bytes)
        for entry in model.launches(vocab, r.logits.element_size(), gpu):
            triton.program_threads = entry["threads"]
            attempt(
                rows, entry, bandwidth, 2 * r.logits.nbytes,
                lambda r=r: clock(lambda: ops.fused_(r.logits, *r.arguments(), "triton"),
                                  seconds=0.2),
            )  # fmt: skip
        triton.program_threads = 0
        del r
    return {"copy_bytes_a_second": bandwidth, "rows": rows}


# ---- one after the other ------------------------------------------------------------------------


def run_section(name: str) -> None:
    """In a process of its own: the result is the last line of its output."""
    sys.path.insert(0, str(ROOT))
    try:
        answer = {"ok": True, "result": SECTIONS[name][1]()}
    except Exception:
        answer = {"ok": False, "error": traceback.format_exc()[-6000:]}
    print("\n" + json.dumps(answer))


def summary(report: dict[str, Any]) -> None:
    for name, part in report["sections"].items():
        state = "ok" if part.get("ok") else "FAILED"
        print(f"{name:<14}{state:<8}{part['seconds']:6.1f} s")
        if not part.get("ok"):
            print("    " + str(part.get("error", ""))[-600:].replace("\n", "\n    "))
    wrong = report["sections"].get("correct", {}).get("result") or []
    print(f"{len(wrong)} comparisons, {sum(not row['ok'] for row in wrong)} of them wrong")
    speeds = report["sections"].get("speed", {}).get("result") or {}
    if speeds:
        print(f"copy {speeds['copy_bytes_a_second'] / 1e12:.3f} TB/s")
    tried = report["sections"].get("launches", {}).get("result") or {}
    for row in tried.get("rows", ()):
        what = f"{row['threads']} threads{' *' if row['chosen'] else ''}"
        measured = row.get("error") or f"{row['share_of_copy']:7.1%} of copy"
        shape = f"{8 * row['size']} bit x {row['vocab']}"
        print(f"{shape:<16}{what:<14}{measured[:80]}, model {row['share']:.1%}")
    for row in speeds.get("rows", ()):
        shape = f"{row['rows']} x {row['vocab']}"
        result = row.get("error") or f"{row['ms']:8.3f} ms {row['share_of_copy']:7.1%} of copy"
        print(f"{shape:<16}{row['backend']:<15}{row['what']:<34}{result[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", type=lambda text: text.split(","), help=",".join(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=["small", "one_launch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        sys.path.insert(0, str(ROOT))
        globals()[args.run]()
        return
    if args.section:
        run_section(args.section)
        return

    deadline = time.time() + LIMIT
    report: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    report["sections"] = {}
    for name, (seconds, _) in SECTIONS.items():
        if args.only and name not in args.only:
            continue
        left = min(seconds, deadline - time.time())
        start = time.time()
        part: dict[str, Any]
        if left < 5:
            part = {"ok": False, "error": "no time left"}
        else:
            command = (sys.executable, __file__, "--section", name)
            try:
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, errors="replace",
                    timeout=left, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
                )  # fmt: skip
                try:
                    part = json.loads(done.stdout.strip().splitlines()[-1])
                except (IndexError, ValueError):
                    part = {"ok": False, "error": (done.stdout + done.stderr)[-4000:]}
            except subprocess.TimeoutExpired:
                part = {"ok": False, "error": f"not done after {left:.0f} s"}
        part["seconds"] = round(time.time() - start, 1)
        report["sections"][name] = part
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
        print(f"{name}: {'ok' if part.get('ok') else 'FAILED'} in {part['seconds']} s", flush=True)
    summary(report)


if __name__ == "__main__":
    main()
