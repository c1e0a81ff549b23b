"""`dcpo demo` from end to end, with sizes that take seconds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
from train_world import disk_of

from dcpo_kernels.demo import cli, stages
from dcpo_kernels.train import read_problems
from dcpo_kernels.train.loop import read_metrics

TINY = [
    "--warmup-problems=64",
    "--warmup-steps=20",
    "--problems=16",
    "--heldout=12",
    "--samples=2",
    "--prompts-per-step=4",
    "--group-size=4",
    "--minibatches=2",
    "--hidden-size=16",
    "--layers=1",
    "--vocab-size=64",
    "--steps=3",
]


def run(tmp_path, *options):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args([*TINY, "--output-dir", str(tmp_path), *options]))


def check_outputs(path, methods, steps):
    table = (path / "table.txt").read_text(encoding="utf-8")
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((path / "results.json").read_text())
    for name in methods:
        lines = read_metrics(path / name / "metrics.jsonl")
        assert len(lines) == steps
        assert all(
            {"reward", "rur", "tcr", "entropy", "seconds_loss"} <= set(line) for line in lines
        )
    return table, results


def test_the_command(tmp_path):
    """On a terminal that knows ASCII alone, and a locale that says the same of files."""
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dcpo_kernels.cli", "demo", *TINY]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ascii, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    table, results = check_outputs(tmp_path, ["grpo", "dcpo"], 3)
    for label in (
        "held-out accuracy, greedy (Avg@1)",
        "held-out accuracy, sampled (Avg@2)",
        "RUR",
        "TCR",
        "entropy",
        "response tokens per second",
        "share of the step in head and loss, our op",
        "share of the step in head and loss, plain",
        "Steps made: 3 grpo, 3 dcpo",
    ):
        assert label in table
        assert label in done.stdout
    assert "±" in table and "?" in done.stdout
    assert results["stopped"] == [] and set(results["after"]) == {"grpo", "dcpo"}
    assert "supervised warm-up" in done.stdout  # plain lines, where nobody watches a bar
    train, heldout = (read_problems(tmp_path / f"{name}.parquet") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (16, 12)
    asked = {p.prompt[0]["content"] for p in train}
    assert asked.isdisjoint(p.prompt[0]["content"] for p in heldout)
    assert {p.index for p in train}.isdisjoint(p.index for p in heldout)


def test_the_time_budget_stops_it_cleanly(tmp_path, capsys):
    assert run(tmp_path, "--minutes", "0") == 0
    table, results = check_outputs(tmp_path, ["grpo", "dcpo"], 0)
    assert "the time budget ended the warm-up after 20 of 40 steps" in table
    assert "the time budget ended training after 0 of 3 steps" in table
    assert len(results["stopped"]) == 2
    assert "the time budget" in capsys.readouterr().out


def test_control_c_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    whole = stages.train

    def interrupted(trainers, out, **parts):
        whole(trainers, out, **{**parts, "steps": 2})
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", interrupted)
    assert run(tmp_path, "--methods", "dcpo") == 130
    table, results = check_outputs(tmp_path, ["dcpo"], 2)
    assert results["stopped"] == ["interrupted"] and "after" not in results
    assert "Note: interrupted." in table and "RUR" in table
    assert "ahead" not in table  # of whom


def test_impossible_options_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--minibatches", "3") == 2
    assert "not a multiple of minibatches=3" in capsys.readouterr().err
    assert run(tmp_path, "--problems", "2") == 2
    assert "--problems 2 must be at least 4" in capsys.readouterr().err
    assert run(tmp_path, "--vocab-size", "20") == 2
    assert "--vocab-size 20 must be at least 30" in capsys.readouterr().err
    assert run(tmp_path, "--heldout", "1000000") == 2
    assert "there are no 1000080 distinct sums of 4 numbers" in capsys.readouterr().err
    for option, value in (
        ("hidden-size", "0"),
        ("layers", "-1"),
        ("steps", "-1"),
        ("warmup-steps", "-5"),
        ("minutes", "nan"),
        ("minutes", "-1"),
        ("samples", "0"),
        ("vocab-size", "100000000000"),
        ("seed", "-1"),
        ("learning-rate", "inf"),
    ):
        assert run(tmp_path, f"--{option}={value}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option.replace("-", "_") in line.replace("-", "_") and "must be" in line
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_found_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages.Demo, "run", lambda self: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    (tmp_path / "out" / "curves.png").mkdir(parents=True)
    for place, why in (("file/below", "Not a directory"), ("out", "Is a directory")):
        assert run(tmp_path / place) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dcpo demo: ") and line.endswith(f"can't be written: {why}")


def test_a_disk_that_fills_up_costs_no_results(tmp_path, capsys):
    with disk_of(50_000):  # too little for the plots
        assert run(tmp_path, "--methods", "dcpo") == 1
    out, err = capsys.readouterr()
    assert "held-out accuracy" in out and "Steps made: 3 dcpo" in out
    assert err.startswith("dcpo demo: ") and "File too large" in err and err.count("\n") == 1
    assert "after" in json.loads((tmp_path / "results.json").read_text())
