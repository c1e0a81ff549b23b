"""A run that stops and goes on is the run that never stopped, bit by bit."""

from __future__ import annotations

import pytest
import torch
from train_world import small_model, small_trainer, without_times

from dcpo_kernels.train import checkpoint


@pytest.mark.parametrize("method", ["dcpo", "dapo"])
def test_resuming_changes_nothing(tmp_path, method):
    # 4 prompts a step out of 16: by the sixth step problems come back, and with them SAS's history
    straight = small_trainer(method)
    expected = [without_times(straight.step()) for _ in range(6)][3:]

    stopped = small_trainer(method)
    for _ in range(3):
        stopped.step()
    path = checkpoint.save(stopped, tmp_path / "step-3")
    resumed = small_trainer(method, model=small_model(warmup_steps=1))
    checkpoint.load(resumed, path)
    assert resumed.steps == 3
    assert [without_times(resumed.step()) for _ in range(3)] == expected
    for name, parameter in straight.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    trainer = small_trainer()
    path = checkpoint.save(trainer, tmp_path / "step-0")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "trainer.pt"} <= set(before)
    trainer.step()
    checkpoint.save(trainer, path)  # over the old one
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert after["trainer.pt"] != before["trainer.pt"]

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    for name in ("step-0", "step-1"):
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(trainer, tmp_path / name)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == after
    assert list(tmp_path.iterdir()) == [path]


def test_latest(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    whole = ["step-9", "step-10"]
    others = ["step-10-backup", "step-", "step-011", "step--12", "step-1_3", "step-١٤"]
    for name in (*whole, *others, "step-11"):
        (tmp_path / name).mkdir()
    for name in (*whole, *others):
        (tmp_path / name / "trainer.pt").touch()
    (tmp_path / "step-12").write_text("a file")
    for link in ("step-best", "step-13"):
        (tmp_path / link).symlink_to("step-9")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
