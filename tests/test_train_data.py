"""Problems in parquet: the round trip, and an error for each way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_world import PROBLEMS

from dcpo_kernels.train import Problem, ProblemError, data, read_problems, write_problems
from dcpo_kernels.train.data import ProblemOrder


def row(index):
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": f"What is {index} + 1?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(index + 1), "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "problems.parquet"
    write_problems(path, PROBLEMS)
    assert read_problems(path) == PROBLEMS
    prompt = [{"role": "system", "content": "Be brief."}, *PROBLEMS[0].prompt]
    named = [Problem("a-7", prompt, r"\frac12")]
    write_problems(path, named)
    assert read_problems(path) == named
    assert [p.name for p in path.parent.iterdir()] == ["problems.parquet"]


def test_files_of_the_dcpo_repository_are_read(tmp_path):
    """They hold more columns, and more fields in extra_info."""
    rows = [{**row(i), "source_prompt": "x"} for i in range(3)]
    problems = read_problems(write_rows(tmp_path / "p.parquet", rows))
    assert [p.index for p in problems] == [0, 1, 2]
    assert problems[2].ground_truth == "3" and problems[2].data_source == "math"


EMPTY = {  # mistakes that one row can make
    "prompt is empty": lambda r: r.update(prompt=[]),
    "prompt must be a list of {role, content}, got null": lambda r: r.update(prompt=None),
    "prompt[0].content is empty": lambda r: r["prompt"][0].update(content=" \n"),
    "prompt[0].content is missing": lambda r: r["prompt"][0].pop("content"),
    "reward_model.ground_truth is empty": lambda r: r["reward_model"].update(ground_truth=""),
    "reward_model.ground_truth is missing": lambda r: r["reward_model"].pop("ground_truth"),
    "reward_model.style is missing": lambda r: r["reward_model"].update(style=None),
    "extra_info.index is missing": lambda r: r["extra_info"].update(index=None),
    "data_source is empty": lambda r: r.update(data_source=""),
}
WRONG_TYPE = {  # a column has one type: the first row is as wrong as all others
    "prompt must be a list of {role, content}, got str": {"prompt": "1 + 1?"},
    "prompt[0] must be a struct with role, got str": {"prompt": ["1 + 1?"]},
    "prompt[0].content must be a string, got int": {"prompt": [{"role": "user", "content": 7}]},
    "reward_model.ground_truth must be a string, got float": {
        "reward_model": {"ground_truth": 1.5, "style": "rule"}
    },
    "reward_model must be a struct with ground_truth, got str": {"reward_model": "2"},
    "extra_info.index must be an integer or a string, got float": {"extra_info": {"index": 1.5}},
    "extra_info.index must be an integer or a string, got bool": {"extra_info": {"index": True}},
    "extra_info.index is missing": {"extra_info": {"split": "train"}},
    "ability must be a string, got int": {"ability": 1},
}


def refusal(path, rows) -> str:
    """What reading them says, after the path."""
    with pytest.raises(ProblemError) as caught:
        read_problems(write_rows(path, rows))
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("message", EMPTY)
def test_what_is_empty_is_named(tmp_path, message):
    rows = [row(0), row(1), row(2)]
    EMPTY[message](rows[1])
    assert refusal(tmp_path / "bad.parquet", rows) == f"row 1: {message}"


@pytest.mark.parametrize("message", WRONG_TYPE)
def test_a_wrong_type_is_named(tmp_path, message):
    rows = [{**row(i), **WRONG_TYPE[message]} for i in (0, 1)]
    assert refusal(tmp_path / "bad.parquet", rows) == f"row 0: {message}"


@pytest.mark.parametrize("column", data.COLUMNS)
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{key: value for key, value in row(0).items() if key != column}]
    said = refusal(tmp_path / "bad.parquet", rows)
    assert said.startswith(f"every row from 0 on: no column {column};")


def test_a_duplicate_index_names_both_rows(tmp_path):
    said = refusal(tmp_path / "bad.parquet", [row(5), row(6), row(5)])
    assert "row 2: extra_info.index 5 is also that of row 0" in said


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_problems(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ProblemError, match=r"text\.parquet: not a readable parquet file"):
        read_problems(tmp_path / "text.parquet")
    path = write_rows(tmp_path / "empty.parquet", [row(0)])
    pq.write_table(pq.read_table(path)[:0], path)
    with pytest.raises(ProblemError, match="no rows"):
        read_problems(path)


def test_damage_is_a_problem_error(tmp_path):
    """Whatever it makes pyarrow raise, and where: text decodes long after the file was read."""
    path = write_rows(tmp_path / "bad.parquet", [row(0), row(1)])
    path.write_bytes(path.read_bytes().replace(b"What is", b"What \xff\xfe"))
    with pytest.raises(ProblemError, match=r"bad\.parquet: not a readable parquet file"):
        read_problems(path)
    write_problems(path, PROBLEMS)
    whole = path.read_bytes()
    flip = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[flip.randrange(len(whole))] ^= 1 << flip.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(ProblemError):
            read_problems(path)


UNWRITABLE = {
    "extra_info.index is of type str, that of row 0 int; a column has one type": {"index": "a"},
    f"extra_info.index {2**63} does not fit in 64 bits": {"index": 2**63},
    "reward_model.ground_truth holds half a surrogate pair: no Unicode text": {
        "ground_truth": "7\ud83d"
    },
}


@pytest.mark.parametrize("message", UNWRITABLE)
def test_what_parquet_cannot_hold_is_named(tmp_path, message):
    path = tmp_path / "problems.parquet"
    bad = PROBLEMS[1]._replace(**UNWRITABLE[message])
    with pytest.raises(ProblemError) as caught:
        write_problems(path, [PROBLEMS[0], bad])
    assert str(caught.value) == f"{path}: row 1: {message}"
    assert list(tmp_path.iterdir()) == []


def test_writing_fails_without_a_trace(tmp_path, monkeypatch):
    path = tmp_path / "problems.parquet"
    write_problems(path, PROBLEMS)
    before = path.read_bytes()
    with pytest.raises(ProblemError, match=r"row 1: extra_info\.index 100"):
        write_problems(path, [PROBLEMS[0], PROBLEMS[0]])

    def broken(table, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(data.pq, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        write_problems(path, PROBLEMS[:2])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_epoch_has_each_problem_once():
    order = ProblemOrder(PROBLEMS, 4, seed=1)
    epochs = [[p.index for _ in range(4) for p in order.take()] for _ in range(3)]
    assert all(sorted(epoch) == [p.index for p in PROBLEMS] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

    again = ProblemOrder(PROBLEMS, 4, seed=1)
    again.taken = 4  # what a checkpoint remembers
    assert [p.index for _ in range(4) for p in again.take()] == epochs[1]

    uneven = ProblemOrder(PROBLEMS, 5, seed=1)
    for _ in range(7):
        assert len({p.index for p in uneven.take()}) == 5
    with pytest.raises(ValueError, match="17 problems was asked for, there are 16"):
        ProblemOrder(PROBLEMS, 17, seed=0)
