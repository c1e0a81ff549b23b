"""bench/gpu_check.py and its scripts, as far as a machine without a GPU can rehearse them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_runs import CASE, OURS

from dcpo_kernels import backends
from dcpo_kernels.bench import gpu_check, implementations, inputs, screen
from dcpo_kernels.bench.operators import operators

LIMIT = 500.0  # seconds: stands for a section's own


def run(command: str, limit: float = LIMIT) -> dict:
    env = {**os.environ, "PYTHON": sys.executable}
    return gpu_check.run(gpu_check.Section("one", limit, command), limit, env)


@pytest.fixture
def ready(tmp_path, monkeypatch) -> Path:
    """A file that a command writes once it is where the test wants it: then its time is over."""
    path = tmp_path / "ready"

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != LIMIT:
                return super().wait(timeout)
            while not path.exists():
                time.sleep(0.02)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Popen)
    return path


def running(pid: str) -> bool:
    """A zombie isn't: who started it died before it, and whoever inherits it need not hurry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_hanging_section_is_stopped_and_leaves_nothing(ready, monkeypatch):
    """Neither the process, which won't be told to stop, nor a child in a session of its own."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.1)
    found = run(
        "trap '' INT; echo half of it; setsid sleep 600 &\n"
        f"echo $$ $! > {ready}.part; mv {ready}.part {ready}; while true; do sleep 600; done"
    )
    assert (found["status"], found["output"]) == (None, "half of it\n")
    for pid in ready.read_text().split():
        end = time.monotonic() + 60
        while running(pid):
            assert time.monotonic() < end, f"{pid} is still there"
            time.sleep(0.05)


def test_a_section_that_is_told_to_stop_may_say_what_it_has(ready):
    found = run(f"trap 'echo kept; exit' INT; touch {ready}; while true; do sleep 0.1; done")
    assert (found["status"], found["output"]) == (None, "kept\n")


def test_sections_after_a_failure_run_and_each_is_written(tmp_path, monkeypatch, capsys):
    commands = {"bad": (60, "kill -ABRT $$"), "slow": (0.1, "sleep 600"), "good": (60, "echo fine")}
    sections = [gpu_check.Section(name, *rest) for name, rest in commands.items()]
    monkeypatch.setattr(gpu_check, "PARTS", {1: sections})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--part", "1"])
    assert gpu_check.main() == 1
    lines = (tmp_path / "part1.jsonl").read_text().splitlines()
    found = {line["section"]: line["status"] for line in map(json.loads, lines)}
    assert found == {"bad": -6, "slow": None, "good": 0}
    assert "==== slow: STOPPED" in capsys.readouterr().out


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_no_part_takes_more_than_nine_minutes(part, tmp_path, monkeypatch):
    """Even where every section takes all it may; and none is left without a chance."""
    now = 0.0

    def run(section, limit, env):
        nonlocal now
        assert limit > 30
        now += limit + gpu_check.GRACE_SECONDS
        return {"section": section.name, "status": None, "seconds": limit, "output": ""}

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--part", str(part)])
    gpu_check.main()
    assert now <= 9 * 60


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_rehearsal(part, tmp_path):
    """The commands themselves, on a CPU, with a few small rows."""
    check = [sys.executable, gpu_check.__file__, tmp_path, "--part", str(part), "--device", "cpu"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = (tmp_path / f"part{part}.jsonl").read_text().splitlines()
    found = {line["section"]: line["status"] for line in map(json.loads, lines)}
    assert found == {section.name: 0 for section in gpu_check.PARTS[part]}
    (path,) = tmp_path.glob("*.json")
    assert path.stem in found
    record = json.loads(path.read_text())
    assert record["complete"]
    assert any("seconds" in row for row in record["rows"])
    if OURS == "cpu" and path.stem != "linear":
        assert gpu_check.fastest(path) == ["cpu", "16", "503"]


# ---- scripts ------------------------------------------------------------------------------------


def run_script(name: str, tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "echo"}
    script = [str(gpu_check.ROOT / "scripts" / name), *arguments]
    return subprocess.run(script, capture_output=True, text=True, env=env, check=False)


def tool(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_profile_counts_per_logit(tmp_path):
    tool(
        tmp_path / "ncu",
        'echo "$@" > "$(dirname "$0")/said"; printf "%s\n" "  dram__bytes_read.sum byte 2,000"'
        ' "  dram__bytes_write.sum byte 2,000" "  smsp__inst_executed.sum inst 500"',
    )
    done = run_script("profile.sh", tmp_path, "triton", "10", "100")
    assert done.returncode == 0, done.stderr
    assert "per logit: 4.000 bytes of memory, 16.00 instructions" in done.stdout
    assert "--tokens 10 --vocab 100 --backend triton" in (tmp_path / "said").read_text()
    tool(tmp_path / "ncu", "echo ==ERROR== ERR_NVGPUCTRPERM")
    assert run_script("profile.sh", tmp_path).returncode == 1


def test_sanitize_names_the_tools_that_found_something(tmp_path):
    tool(
        tmp_path / "compute-sanitizer",
        "[ $1 != --help ] || exec echo --kernel-regex; [ $2 != racecheck ] || exit 9\n"
        "[[ $* = *kernel_substring=dcpo*odd_rows* ]]",
    )
    done = run_script("sanitize.sh", tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(": racecheck(9)")
    tool(tmp_path / "compute-sanitizer", "exit 0")
    assert run_script("sanitize.sh", tmp_path).returncode == 0


# ---- other ways to launch ------------------------------------------------------------------------


def test_variants_name_arguments_that_there_are():
    for backend, name, value in implementations.VARIANTS.values():
        arguments = inspect.signature(backends.kernels(backend).fused).parameters
        assert type(arguments[name].default) is type(value)


def test_a_variant_is_launched_its_way_and_only_it(monkeypatch):
    seen = []
    kernels, launched = backends.kernels("reference"), []
    fused = kernels.fused
    monkeypatch.setattr(
        kernels, "fused", lambda *records, way=0: (launched.append(way), fused(*records))
    )
    monkeypatch.setattr(implementations, "VARIANTS", {"other": ("reference", "way", 7)})
    right = operators()["fused"]
    data = inputs.make(CASE)

    class Watched:
        name = "fused"
        backward, minimum_bytes = right.backward, staticmethod(right.minimum_bytes)

        @staticmethod
        def ours(data, name, inplace):
            function = right.ours(data, name, False)

            def run(logits: torch.Tensor) -> torch.Tensor:
                seen.append(inplace)
                return function(logits)

            return run

    found = implementations.implementations(Watched, data, ["other"], [])
    assert [row.name for row in found] == ["other, in place", "copy"]
    assert launched == []
    implementations.Call(right, data, found[0].make().function)()
    assert (launched, seen) == ([7], [True])
    implementations.Call(right, data, right.ours(data, "reference", False))()
    assert launched == [7, 0]


# ---- a machine that lacks what only looks good ---------------------------------------------------


def test_without_rich_tables_are_plain(monkeypatch, capsys):
    monkeypatch.setattr(screen, "Console", None)
    plain = screen.Screen(80)
    with plain.progress("a case") as bar:
        bar.stage("inputs")
        bar.rounds(1, 0.5)
    plain.table("title", ["", "median"], [["cpu", "1 ms"], ["a longer name", "12 ms"]])
    plain.say("[done]", "red")
    lines = capsys.readouterr().out.splitlines()
    assert "rich is not installed" in lines[0]
    assert lines[1:3] == ["a case", "title"]
    assert lines[3:] == [
        "               median",
        "cpu              1 ms",
        "a longer name   12 ms",
        "[done]",
    ]


def test_a_machine_with_nothing_but_torch_measures(tmp_path):
    """No rich, no matplotlib, no pydantic: a sentence each, and the record is written."""
    path = tmp_path / "run.json"
    code = """if True:
        import sys
        sys.modules.update(dict.fromkeys(["rich", "matplotlib", "pydantic", "pynvml"]))
        from dcpo_kernels import cli
        what = ["--tokens", "8", "--vocab", "503", "--backend", "eager", "--peers", "none"]
        how = ["--seconds", "0", "--json", sys.argv[1], "--plot", "x"]
        measured = cli.main(["bench", *what, *how])
        print(measured, cli.main(["bench", "--load", sys.argv[1]]))
    """
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["complete"]
    assert "nothing drawn: matplotlib is not installed" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 2"
    assert "pip install pydantic" in done.stderr
