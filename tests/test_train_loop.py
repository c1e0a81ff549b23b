"""The loop: it learns, takes turns, stops in time, and leaves whole lines behind."""

from __future__ import annotations

import json
import time

import pytest
from train_world import disk_of, small_model, small_trainer

from dcpo_kernels.train import checkpoint, train
from dcpo_kernels.train.loop import MetricsLog, read_metrics


@pytest.mark.parametrize("method", ["dcpo", "grpo"])
def test_reward_rises(tmp_path, method):
    """The warm-up leaves answers without the format: that much is learned in seconds."""
    sizes = {"prompts_per_step": 16, "group_size": 8, "minibatches": 4, "micro_batch_size": 32}
    trainer = small_trainer(method, small_model(warmup_steps=100), **sizes, learning_rate=2e-3)
    history = train({method: trainer}, tmp_path, steps=20)[method]
    first, last = history[:3], history[-3:]
    gain = sum(line["reward"] for line in last) / 3 - sum(line["reward"] for line in first) / 3
    assert gain > 0.15, history
    assert sum(line["unformatted"] for line in last) < sum(line["unformatted"] for line in first)
    assert any(line["tcr"] > 0 for line in history)


def test_trainers_take_turns_and_every_step_is_a_line(tmp_path):
    trainers = {"grpo": small_trainer("grpo"), "dcpo": small_trainer("dcpo")}
    told = []
    history = train(
        trainers,
        tmp_path,
        steps=4,
        evaluate_every=2,
        evaluation=lambda model: {"heldout_accuracy": 0.25},
        checkpoint_every=3,
        advance=lambda n, text: told.append(
            (n, text, trainers["grpo"].steps, trainers["dcpo"].steps)
        ),
    )
    assert [t[0] for t in told] == [1] * 4
    assert [t[2:] for t in told] == [(i, i) for i in (1, 2, 3, 4)]
    assert "grpo reward" in told[0][1] and "dcpo reward" in told[0][1]
    for name, lines in history.items():
        text = (tmp_path / name / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        assert [json.loads(line) for line in text.splitlines()] == lines
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert ["heldout_accuracy" in line for line in lines] == [False, True, False, True]
        assert checkpoint.latest(tmp_path / name) == tmp_path / name / "step-3"


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    straight = train({"a": small_trainer()}, tmp_path / "1", steps=4)["a"]
    train({"a": small_trainer()}, tmp_path / "2", steps=3, checkpoint_every=2)
    resumed = small_trainer()
    checkpoint.load(resumed, checkpoint.latest(tmp_path / "2" / "a"))
    train({"a": resumed}, tmp_path / "2", steps=4)
    lines = read_metrics(tmp_path / "2" / "a" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # step 3 once
    assert [line["reward"] for line in lines] == [line["reward"] for line in straight]
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight]


def test_a_deadline_ends_it_between_rounds(tmp_path):
    trainers = {"a": small_trainer(), "b": small_trainer("grpo")}
    assert train(trainers, tmp_path, steps=3, deadline=time.monotonic() - 1) == {"a": [], "b": []}
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == ""

    def late(model):
        time.sleep(0.1)
        return {}

    # A round takes 0.2 s or more: the second would not be over in time.
    history = train(
        trainers,
        tmp_path,
        steps=3,
        deadline=time.monotonic() + 0.15,
        evaluate_every=1,
        evaluation=late,
    )
    assert [len(lines) for lines in history.values()] == [1, 1]


def test_an_interrupted_run_keeps_its_lines(tmp_path):
    def interrupt(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train({"a": small_trainer()}, tmp_path, steps=5, evaluate_every=3, evaluation=interrupt)
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]


def test_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    log = MetricsLog(path, steps=1)
    log.write({"step": 2, "reward": 0.5})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "reward": 0.5}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    before = path.read_bytes()
    with disk_of(len(before) + 5), pytest.raises(OSError):
        log.write({"step": 2})
    assert path.read_bytes() == before
    log.write({"step": 2})  # there is room again
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "broken", [b'{"step": 2, "rew{"step": 3}', b"\xff\0\0", b"[2]", b"{}", b'{"step": "2"}', b""]
)
def test_a_broken_line_is_named_and_skipped(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 4}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2 is broken"):
        assert read_metrics(path) == [{"step": 1}, {"step": 4}]
