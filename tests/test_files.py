"""What is written appears whole or not at all: files and folders."""

from __future__ import annotations

import os

import pytest
from train_world import disk_of

from dcpo_kernels.files import check_writable, written_whole


def make(path, text, folder):
    if folder:
        path.mkdir()
        path /= "inside"
    path.write_text(text)


@pytest.mark.parametrize("folder", [False, True])
def test_it_takes_the_place_of_what_was_there(tmp_path, folder):
    path = tmp_path / "deep" / "result.png"
    for text in ("first", "second"):
        with written_whole(path) as new:
            assert new.suffix == ".png" and new.parent == path.parent
            make(new, text, folder)
        assert (path / "inside" if folder else path).read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_no_trace(tmp_path, folder, there):
    path = tmp_path / "result"
    if there:
        make(path, "before", folder)
    with pytest.raises(KeyboardInterrupt), written_whole(path) as new:
        make(new, "half", folder)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == ([path] if there else [])
    if there:
        assert (path / "inside" if folder else path).read_text() == "before"


def test_what_was_there_comes_back(tmp_path, monkeypatch):
    """Of the two renames that replace a folder the second fails."""
    path = tmp_path / "result"
    make(path, "before", folder=True)
    rename = os.rename

    def broken(source, target):
        if ".new." in str(source):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="disk full"), written_whole(path) as new:
        make(new, "after", folder=True)
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "inside").read_text() == "before"


def test_what_cannot_be_written_is_found_before(tmp_path):
    check_writable(tmp_path / "deep" / "result.json")
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"below/result\.json can't be written: Not a directory"):
        check_writable(tmp_path / "file" / "below" / "result.json")
    with pytest.raises(OSError, match="deep can't be written: Is a directory"):
        check_writable(tmp_path / "deep")
    with disk_of(100), pytest.raises(OSError, match=r"other can't be written: File too large"):
        check_writable(tmp_path / "other")
    assert not (tmp_path / "other").exists()
