"""The microbenchmark's record, and everything that is made from it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_runs import OURS, bench, make_quick, quick

from dcpo_kernels.bench import (
    compare,
    machine,
    plots,
    readme,
    records,
    roofline,
    stats,
    table,
    timing,
)
from dcpo_kernels.bench.screen import Screen
from dcpo_kernels.bench.suites import SHAPES, SUITES, loss

__all__ = ["quick"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> records.Record:
    """A small run of every operator, as a record."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        status = bench(
            *("fused", "two_pass", "read", "--tokens", "16,24", "--vocab", "503,1003"),
            *("--backend", f"{OURS},triton,eager", "--json", str(path)),
        )
    assert status == 0
    return records.load(path)


# ---- the record, and what is made of it ----------------------------------------------------------


def test_record_is_complete(measured):
    assert measured.complete
    assert measured.command.startswith("dcpo")
    rows = measured.rows
    assert {row.operator for row in rows} == {"fused", "two_pass", "read"}
    triton = [row for row in rows if row.name == "triton"]
    assert all(row.note for row in triton)
    for row in rows:
        if row.status != "ok":
            assert row.note
            continue
        assert len(row.samples) == row.seconds.samples >= timing.MIN_ROUNDS
        assert row.seconds == stats.summarize(row.samples)
        assert (row.agreement is not None) == (row.kind != "copy")


def test_in_place_takes_next_to_nothing(measured):
    rows = [row for row in measured.rows if row.name == "cpu, in place"]
    for row in rows:
        if row.operator == "fused":
            assert row.extra_bytes < 16 * 1024  # per token, whatever the vocabulary
    if OURS == "cpu":
        assert rows


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda r: r.pop("rows"), "record.rows: Field required"),
        (lambda r: r.update(schema=2), "record.schema: Input should be 1"),
        (lambda r: r.update(cache=1), "record.cache: Input should be a valid string"),
        (lambda r: r.update(complete=1), "record.complete: Input should be a valid boolean"),
        (lambda r: r.update(more=1), "record.more: Unexpected"),
        (
            lambda r: r["rows"][0].update(tokens=0),
            r"rows\[0\]: .* tokens must be at least 1",
        ),
        (lambda r: r["rows"][0].update(tokens=1.5), r"record.rows\[0\].tokens: .* valid integer"),
        (lambda r: r["rows"][1].update(status="?"), r"record.rows\[1\].status: .* 'ok'"),
        (lambda r: r["rows"][0]["seconds"].pop("low"), r"rows\[0\].seconds.low: Field required"),
    ],
)
def test_bad_record_is_named_by_field(measured, tmp_path, spoil, problem):
    path = tmp_path / "bad.json"
    records.save(measured, path)
    bad = json.loads(path.read_text())
    spoil(bad)
    path.write_text(json.dumps(bad))
    with pytest.raises(records.BadRecord, match=problem):
        records.load(path)
    assert bench("--load", str(path)) == 2


def test_record_is_read_as_it_was_written(measured, tmp_path):
    records.save(measured, tmp_path / "run.json")
    assert records.load(tmp_path / "run.json") == measured


def test_committed_results_load():
    paths = list((machine.ROOT / "bench" / "results").glob("*.json"))
    assert paths
    for path in paths:
        assert records.load(path).complete


def test_table(measured, capsys):
    table.show(Screen(width=160), measured.rows, "eager")
    text = capsys.readouterr().out
    assert "fused dcpo, 24 x 1003 bf16 on cpu" in text
    assert "of copy" in text
    assert "extra memory" in text
    assert "triton: missing" in text
    table.show(Screen(width=80), measured.rows, "eager")


def test_units():
    for seconds, text in ((1.234, "1.23 s"), (0.1234, "123 ms"), (5e-3, "5 ms"), (4e-6, "4 µs")):
        assert table.duration(seconds) == text
    for count, text in ((0, "0 B"), (999, "999 B"), (77_791_232, "77.8 MB"), (2.5e9, "2.5 GB")):
        assert table.size(count) == text


def timed_as(row: records.Row, factor: float) -> records.Row:
    """By a quiet machine, so that the verdicts are those of the factors."""
    if row.seconds is None:
        return row
    seconds = stats.summarize([factor * t for t in row.samples])
    return replace(row, seconds=replace(seconds, low=seconds.median, high=seconds.median))


def test_compare(measured, tmp_path, capsys):
    rows = [timed_as(row, 2.0 if row.tokens == 24 else 1.0) for row in measured.rows]
    host = measured.environment.host
    elsewhere = replace(measured.environment, host=replace(host, threads=host.threads + 1))
    old = replace(measured, rows=rows, environment=elsewhere)
    calm = replace(measured, rows=[timed_as(row, 1.0) for row in measured.rows])
    found = compare.verdicts(calm.rows, old.rows)
    assert len(found) == sum(row.seconds is not None for row in calm.rows)
    assert {verdict for row, _, verdict in found if row.tokens == 24} == {"FAST"}
    assert {verdict for row, _, verdict in found if row.tokens == 16} == {"SAME"}
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, some in zip(paths, (old, calm), strict=True):
        records.save(some, path)
    assert bench("--load", str(paths[1]), "--compare", str(paths[0])) == 0
    text = capsys.readouterr().out
    assert "FAST" in text
    assert "threads:" in text


def test_roofline(measured, capsys):
    roofline.show(Screen(width=120), measured.rows, 4800)
    text = capsys.readouterr().out
    assert "at 4800 GB/s, at best" in text
    rows = [r for r in measured.rows if r.operator == "fused" and r.kind == "ours"]
    floor = rows[0].minimum_bytes
    assert rows[0].traffic_bytes == floor
    assert floor == 4 * rows[0].tokens * rows[0].vocab


def test_plots(measured, tmp_path):
    drawn = plots.draw(measured.rows, "eager", tmp_path)
    assert {path.name for path in drawn} == {
        *("bandwidth.png", "time.png", "speedup.png", "memory.png")
    }
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    few = [row for row in measured.rows if row.tokens == 16 and row.vocab == 503]
    drawn = plots.draw(few, "eager", tmp_path / "few")
    assert {path.name for path in drawn} == {"speedup.png", "memory.png"}


@pytest.mark.slow
def test_torch_compile_is_checked_counted_and_timed(tmp_path):
    path = tmp_path / "run.json"
    status = bench(
        *("--tokens", "16", "--vocab", "503", "--backend", "compile,eager"),
        *("--roofline", "4800", "--json", str(path)),
    )
    assert status == 0
    rows = {row.name: row for row in records.load(path).rows}
    assert rows["torch.compile"].status == "ok"
    floor = rows["eager"].minimum_bytes
    assert rows["eager"].traffic_bytes > 5 * floor
    assert floor < rows["torch.compile"].traffic_bytes < rows["eager"].traffic_bytes


# ---- the README ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, measured) -> Path:
    """Texts with a number typed by hand, and a result."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        (tmp_path / name).write_text(
            f"# before\n\n{readme.BEGIN}\nmade up: 99 times faster\n{readme.END}\n\nafter\n"
        )
    tokens, vocab = SHAPES["cpu"][0]
    rows = [  # as if it had been measured at the README's shape
        replace(row, tokens=tokens, vocab=vocab) if row.case.shape == (24, 1003) else row
        for row in measured.rows
    ]
    result = replace(measured, rows=rows)
    records.save(result, tmp_path / "bench" / "results" / readme.result_file(result))
    return tmp_path


def test_readme_is_made_from_results(checkout, measured, monkeypatch):
    result = next((checkout / "bench" / "results").iterdir())
    monkeypatch.setattr(machine, "ROOT", checkout)
    assert bench("--suite", "readme", "--load", str(result)) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# before\n\n")
    assert text.endswith(f"{readme.END}\n\nafter\n")
    assert "made up" not in text
    rows = [row for row in records.load(result).rows if row.tokens == 256]
    timed = [row for row in rows if row.operator == "fused" and row.seconds]
    assert timed
    for row in timed:
        assert table.duration(row.seconds.median) in text
    performance = (checkout / "docs" / "performance.md").read_text()
    assert performance.startswith("# before\n\n") and performance.endswith("\n\nafter\n")
    assert "made up" not in performance
    for row in measured.rows:
        if row.status == "missing":
            assert row.note in performance
    assert "### read, 16 x 503 bf16 on cpu" in performance
    readme.write(checkout)
    assert (checkout / "README.md").read_text() == text
    assert (checkout / "docs" / "performance.md").read_text() == performance


@pytest.mark.parametrize(
    "text", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", f"{2 * readme.BEGIN}{readme.END}"]
)
def test_readme_without_its_place(checkout, text):
    (checkout / "README.md").write_text(text)
    with pytest.raises(records.BadRecord, match="needs one line"):
        readme.write(checkout)
    assert (checkout / "README.md").read_text() == text


def test_readme_without_results(checkout):
    for path in (checkout / "bench" / "results").iterdir():
        path.unlink()
    with pytest.raises(records.BadRecord, match="holds no results"):
        readme.write(checkout)


def test_suite_measures_what_the_readme_shows():
    for device in ("cpu", "cuda"):
        cases = SUITES["readme"](device)
        for shape in SHAPES[device]:
            assert loss(*shape, device) in cases


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES)
def test_suite_measures_nothing_twice(suite, device):
    cases = SUITES[suite](device)
    assert cases and len(set(cases)) == len(cases)
