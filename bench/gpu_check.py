"""Everything that only a GPU can say of the kernels, in three calls of at most nine minutes, what
matters most first:

    python bench/gpu_check.py FOLDER --part 1        then 2, then 3

Run it from the checkout. It needs torch, triton, nvcc, pybind11, cmake, ninja and pytest, and no
network. A section is a command with a limit of its own: a failure, a hang or a broken CUDA context
costs nothing but that section. FOLDER/partN.jsonl gets a line as each ends; records of the
benchmark lie beside it, written after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 525.0
GRACE_SECONDS = 8.0  # for what was told to stop to say what it has
TAG = "DCPO_GPU_CHECK"  # an environment variable: whatever has our value of it is ours to end
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail", "10"]


class Section(NamedTuple):
    name: str
    seconds: float  # at most
    command: Callable[[], list[str]]  # asked for when its turn comes


def parts(folder: Path, device: str) -> dict[int, list[Section]]:
    """device "cpu": a rehearsal of everything but the build, with a few small rows."""
    rehearsal = ["--device", "cpu", "--backend", "cpu,cuda-cluster-2"] if device == "cpu" else []
    workers = ["-n", "4"] if device == "cuda" and importlib.util.find_spec("xdist") else []

    def bench(name: str, seconds: float, *arguments: str) -> Section:
        command = [sys.executable, "-m", "dcpo_kernels.cli", "bench", *arguments, *rehearsal]
        return Section(name, seconds, lambda: [*command, "--json", str(folder / f"{name}.json")])

    def profile() -> list[str]:
        return ["scripts/profile.sh", *fastest(folder / "kernels.json")]

    setup = f"{sys.executable} setup.py --quiet build_ext --inplace"
    about = f"{sys.executable} -m dcpo_kernels.cli info; nvidia-smi; nvcc --version"
    build = Section(
        "build", 170, lambda: ["bash", "-c", f"{setup} && {about}" if device == "cuda" else about]
    )
    some = "cluster_sizes or odd_rows or vocabularies or golden_batches"
    correct = [*PYTEST, *workers, "-k", some, "tests/test_gpu.py"]
    # What trains needs more packages than a GPU does.
    tests = [*PYTEST, *workers, "--continue-on-collection-errors", "--ignore-glob=*/test_train_*"]
    quick, shape = ("0", ["16", "503"]) if device == "cpu" else ("4", ["4096", "qwen2.5"])
    peers = ["fused", "two_pass", "read", "--objective", "dcpo,grpo", "--seconds", quick]
    return {
        1: [
            build,
            Section("correct", 120, lambda: correct),
            bench("kernels", 200, "--suite", "gpu", "--seconds", "0" if rehearsal else "20"),
            Section("profile", 90, profile),
        ],
        2: [
            build,
            Section("tests", 200, lambda: tests),
            bench("sweep", 400, "--suite", "gpu-sweep", "--seconds", "0" if rehearsal else "2"),
        ],
        3: [
            build,
            Section("sanitizers", 260, lambda: ["scripts/sanitize.sh"]),
            bench("peers", 400, *peers, "--tokens", shape[0], "--vocab", shape[1]),
        ],
    }


def fastest(path: Path) -> list[str]:
    """What scripts/profile.sh takes, of the fastest of our rows in the record's first case."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except OSError:
        return []
    first = [
        row
        for row in rows
        if (row["tokens"], row["vocab"]) == (rows[0]["tokens"], rows[0]["vocab"])
    ]
    ours = [row for row in first if row["kind"] == "ours" and "seconds" in row]
    if not ours:
        return []
    best = min(ours, key=lambda row: row["seconds"]["median"])
    return [best["name"].split(",")[0], str(best["tokens"]), str(best["vocab"])]


def run(section: Section, limit: float) -> dict[str, Any]:
    """Its exit status (None: it was stopped), its time, and the end of what it said. No process of
    it is left."""
    tag = f"{os.getpid()} {section.name}"
    env = {
        "DCPO_CUDA": "ON",
        "DCPO_CUDA_ARCHS": "native",
        "COLUMNS": "150",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        TAG: tag,
    }
    start = time.monotonic()
    stopped = False
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            section.command(), cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            end_all(tag)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
        said = log.read().decode(errors="replace")
    status = None if stopped else process.returncode
    seconds = round(time.monotonic() - start, 1)
    return {"section": section.name, "status": status, "seconds": seconds, "output": said}


def end_all(tag: str) -> None:
    """Kills what was started with this tag, in whatever session and under whatever parent."""
    mark = f"{TAG}={tag}\0".encode()
    for _ in range(5):  # one may have started another meanwhile
        ours = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    ours.append(int(path.parent.name))
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not ours:
            return
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--only", type=lambda text: text.split(","), help="sections, by name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PART_SECONDS
    failed = 0
    for section in parts(folder, args.device)[args.part]:
        left = deadline - time.monotonic() - GRACE_SECONDS
        if (args.only and section.name not in args.only) or left < GRACE_SECONDS:
            continue
        result = run(section, min(section.seconds, left))
        with (folder / f"part{args.part}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        failed += result["status"] != 0
        state = {0: "ok", None: "STOPPED"}.get(result["status"], "FAILED")
        print(f"==== {section.name}: {state} after {result['seconds']} s")
        print(result["output"][-3000:], flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
