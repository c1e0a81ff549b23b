"""Everything that only a GPU can say of the kernels, in four calls of at most nine minutes, what
matters most first:

    python bench/gpu_check.py FOLDER --part 1        then 2, 3 and 4

Run it from the checkout. It needs torch, triton, nvcc, pybind11, cmake, ninja and pytest, and no
network. A section is a command with a limit of its own: a failure, a hang or a broken CUDA context
costs nothing but that section. FOLDER/partN.jsonl gets a line as each ends; records of the
benchmark lie beside it, written after every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 525.0
GRACE_SECONDS = 8.0  # in which a section that was told to stop may write its results
TAG = "DCPO_GPU_CHECK"  # an environment variable that marks the processes of a section


class Section(NamedTuple):
    name: str
    seconds: float  # at most
    command: str  # for bash, in the checkout


BUILD = Section("build", 160, "$BUILD && ($INFO; nvidia-smi; nvcc --version; true)")
SOME = "-k 'cluster_sizes or odd_rows or vocabularies or batch_on_kernels'"
SOME += " tests/test_gpu.py tests/test_golden.py"
ALL = "--continue-on-collection-errors --ignore-glob='*/test_train_*'"  # which need more packages
PEERS = "fused two_pass read --objective dcpo,grpo --tokens 4096"
PARTS = {
    1: [
        BUILD,
        Section("correct", 120, f"$PYTEST {SOME}"),
        Section("kernels", 180, "$BENCH --suite gpu $REHEARSAL --json $FOLDER/kernels.json"),
        Section("profile", 90, "scripts/profile.sh $FASTEST"),
    ],
    2: [
        BUILD,
        Section("tests", 200, f"$PYTEST {ALL}"),
        Section("sweep", 400, "$BENCH --suite gpu-sweep $REHEARSAL --json $FOLDER/sweep.json"),
    ],
    3: [
        BUILD,
        Section("sanitizers", 260, "scripts/sanitize.sh"),
        Section("peers", 400, f"$BENCH {PEERS} $REHEARSAL --json $FOLDER/peers.json"),
    ],
    4: [
        BUILD,
        # Both shapes of bench/linear.py, half the rows without a gradient among their rows.
        Section("linear", 350, "$BENCH linear $SMALL_HEAD --json $FOLDER/linear.json"),
    ],
}


def environment(folder: Path, device: str) -> dict[str, str]:
    """Of the commands. device "cpu": a rehearsal of all but the build, with a few small rows."""
    there = device == "cuda"
    workers = "-n 4" if there and importlib.util.find_spec("xdist") else ""
    few = "--device cpu --seconds 0 --tokens 16 --vocab 503"
    small = f"{few} --backend cpu,cuda-cluster-2"
    return {
        "DCPO_CUDA": "ON",
        "DCPO_CUDA_ARCHS": "native",
        "COLUMNS": "150",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "FOLDER": str(folder),
        "FASTEST": " ".join(fastest(folder / "kernels.json")),
        "BUILD": f"{sys.executable} setup.py --quiet build_ext --inplace" if there else "true",
        "INFO": f"{sys.executable} -m dcpo_kernels.cli info",
        "BENCH": f"{sys.executable} -m dcpo_kernels.cli bench --seconds 4",
        "PYTEST": f"{sys.executable} -m pytest -q -m gpu --maxfail 10 {workers}",
        "REHEARSAL": "" if there else small,
        "SMALL_HEAD": "" if there else f"{few} --width 32",
    }


def fastest(path: Path) -> list[str]:
    """What scripts/profile.sh takes, of the fastest of our rows in the record's first case."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    ours = [
        (row["seconds"]["median"], row["name"].split(",")[0])
        for row in rows
        if row["kind"] == "ours" and row["tokens"] == rows[0]["tokens"] and "seconds" in row
    ]
    return [min(ours)[1], str(rows[0]["tokens"]), str(rows[0]["vocab"])] if ours else []


def _hear_interrupts() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(section: Section, limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Its exit status (None: it was stopped), its time, and the end of its output. None of its
    processes is left."""
    tag = f"{os.getpid()} {section.name}"
    start, stopped = time.monotonic(), False
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["bash", "-c", section.command], cwd=ROOT, env={**env, TAG: tag}, stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=_hear_interrupts,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            end_all(tag)
            with suppress(subprocess.TimeoutExpired):
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
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        time.sleep(0.02)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=int, choices=PARTS, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PART_SECONDS
    failed = False
    for section in PARTS[args.part]:
        left = deadline - time.monotonic() - GRACE_SECONDS
        result = run(section, min(section.seconds, left), environment(folder, args.device))
        with (folder / f"part{args.part}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        failed |= result["status"] != 0
        state = {0: "ok", None: "STOPPED"}.get(result["status"], "FAILED")
        print(f"==== {section.name}: {state} after {result['seconds']} s")
        print(result["output"][-3000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
