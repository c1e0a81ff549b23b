"""`dcpo bench linear`: its inputs, the float64 gradients, the gate, the record."""

from __future__ import annotations

import argparse
import json
import math
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from bench_runs import OURS, make_quick, quick

import dcpo_kernels as dk
from dcpo_kernels.bench import cli, linear, linear_inputs, linear_rows, records, stats, timing
from dcpo_kernels.bench.linear_inputs import Exact, LinearCase, problem
from dcpo_kernels.bench.linear_rows import PEERS, PLAIN, PRODUCTS

__all__ = ["quick"]


@pytest.fixture(autouse=True, scope="module")
def unhurried():
    """However busy the machine is, no call is a long one; small products wait for no thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LONG_SECONDS", math.inf)
        yield
    torch.set_num_threads(threads)


SIZES = ("--tokens", "64", "--width", "32", "--vocab", "502")
CASE = LinearCase(tokens=64, width=32, vocab=502, dtype="fp32", device="cpu")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    quick = ["--device", "cpu", "--seconds", "0", "--peers", "none", "linear"]
    return parser.parse_args([*quick, *arguments])


def bench(*arguments: str) -> int:
    return cli.main(parsed(*arguments))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The record of a small run with all peers."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        peers = ",".join(PEERS)
        status = bench(*SIZES, "--dtype", "bf16,fp32", "--peers", peers, "--json", str(path))
    assert status == 0
    return path


# ---- inputs and float64 gradients ----------------------------------------------------------------


def test_inputs_are_peaked_and_the_same_again():
    batch, again = linear_inputs.make(CASE), linear_inputs.make(CASE)
    assert torch.equal(batch.hidden, again.hidden) and torch.equal(batch.weight, again.weight)
    log_p = torch.log_softmax(F.linear(batch.hidden, batch.weight), -1)
    top = log_p.exp().amax(-1)
    assert top.max() > 0.95 and top.min() < 0.6
    logprobs = log_p.gather(-1, batch.target_ids[..., None])[..., 0]
    ratio = (logprobs - batch.old_logprobs).abs()
    assert ratio.mean() > 0.01 and ratio.max() < 0.11


PROBLEMS = {
    "dcpo": {"objective": dk.dcpo()},
    "masked": {"objective": dk.dcpo(), "masked": True},
    "advantage 0": {"objective": dk.dcpo(), "zero": True},
    "gspo": {"objective": linear_rows.GSPO()},
    "cross entropy": {"objective": None},
}


@pytest.mark.parametrize("sample", [1000, 20])
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_gradients(name, sample, monkeypatch):
    """Those that autograd finds from float64 logits, of all rows or of some."""
    monkeypatch.setattr(linear_inputs, "SAMPLE", sample)
    monkeypatch.setattr(linear_inputs, "CHUNK_BYTES", 8 * CASE.vocab * 7)
    batch = linear_inputs.make(CASE)
    of, exact = problem(batch, **PROBLEMS[name]), Exact(batch)
    leaves = [x.double().requires_grad_() for x in (batch.hidden, batch.weight)]
    log_p = torch.log_softmax(F.linear(*leaves), -1)
    ids = batch.target_ids[..., None]
    of_hidden, of_weight = torch.autograd.grad(
        of.of_logprobs(log_p.gather(-1, ids)[..., 0]), leaves
    )
    assert len(exact.rows) == min(sample, CASE.tokens) and len(exact.ids) == min(sample, CASE.vocab)
    assert max(exact.errors(of, (of_hidden, of_weight))) < 1e-6
    assert exact.errors(of, (1.01 * of_hidden, of_weight))[0] == pytest.approx(0.01, rel=1e-3)
    assert exact.errors(of, (of_hidden, 0.99 * of_weight))[1] == pytest.approx(0.01, rel=1e-3)
    rows = of_hidden.flatten(0, 1).abs().sum(-1) > 0
    assert rows.float().mean() == (0.5 if name in ("masked", "advantage 0") else 1)


# ---- the rows ------------------------------------------------------------------------------------


def test_record(path):
    record = records.load(path, linear.LinearRecord)
    assert record.complete
    by_dtype = {
        dtype: {row.name: row for row in record.rows if row.dtype == dtype}
        for dtype in ("bf16", "fp32")
    }
    for dtype, rows in by_dtype.items():
        assert ("ours, float32 logits" in rows) == (dtype == "bf16")
        assert len([name for name in rows if "default" in name]) == 1
        for peer in (linear_rows.CROSS_ENTROPY.name, *PEERS):
            assert rows[peer].seconds or rows[peer].note
        for name in (PRODUCTS, PLAIN, "ours, gspo", "ours, half the rows masked"):
            assert rows[name].status == "ok"
        for row in rows.values():
            if row.status != "ok":
                assert row.kind == "peer" and row.status == "missing", row.note
                continue
            assert row.seconds == stats.summarize(row.samples)
            assert len(row.samples) >= linear.MIN_ROUNDS
            assert row.extra_bytes > 0
            assert (row.hidden_error is None) == (row.name == PRODUCTS)
    if OURS == "cpu":
        for row in by_dtype["fp32"].values():
            if "chunk" in row.name:  # others copy the hidden states of rows, or move logits
                assert row.predicted_bytes <= row.extra_bytes <= 1.05 * row.predicted_bytes


def test_record_again(path, tmp_path, capsys):
    record = records.load(path, linear.LinearRecord)
    records.save(record, tmp_path / "again.json")
    assert records.load(tmp_path / "again.json", linear.LinearRecord) == record
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert bench("--load", str(path), "--compare", str(path)) == 0
    out = capsys.readouterr().out
    assert "64 of 64 rows of d_hidden, 502 of 502 of d_weight" in out and "now / before" in out
    spoiled = json.loads(path.read_text())
    row = next(row for row in spoiled["rows"] if row["kind"] == "ours")
    row |= {"status": "wrong", "note": "d_hidden is off by 1.0"}
    (tmp_path / "again.json").write_text(json.dumps(spoiled))
    assert bench("--load", str(tmp_path / "again.json")) == 1
    row["tokens"] = "many"
    (tmp_path / "again.json").write_text(json.dumps(spoiled))
    assert bench("--load", str(tmp_path / "again.json")) == 2
    assert f"record.rows[{spoiled['rows'].index(row)}].tokens" in capsys.readouterr().err


def test_chunks_are_those_of_the_operator():
    batch = linear_inputs.make(CASE)
    names = [way.name for way in linear_rows.ways(batch, [1, 3, 64], [])]
    chunks = [name.removeprefix("ours, ") for name in names if "chunk" in name]
    assert chunks == ["1 chunk (default)", "3 chunks", "64 chunks"]


# ---- the gate ------------------------------------------------------------------------------------


class Off(torch.autograd.Function):
    """The same, with a gradient off by a twentieth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.05 * gradient


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("place", [0, 1], ids=["hidden", "weight"])
def test_a_wrong_gradient_is_not_timed_and_fails_the_run(
    place, dtype, monkeypatch, tmp_path, capsys
):
    right = dk.linear_policy_loss

    def wrong(*leaves, **options):
        changed = [Off.apply(x) if i == place else x for i, x in enumerate(leaves)]
        return right(*changed, **options)

    monkeypatch.setattr(dk, "linear_policy_loss", wrong)
    path = tmp_path / "run.json"
    assert bench(*SIZES, "--dtype", dtype, "--chunks", "1", "--json", str(path)) == 1
    for row in records.load(path, linear.LinearRecord).rows:
        ours = row.name.startswith("ours")
        assert row.status == ("wrong" if ours else "ok")
        assert (row.samples is None) == ours
        if ours:
            assert row.note.startswith(("d_hidden is off by", "d_weight is off by")[place])
    assert "WRONG: ours, gspo: d_" in capsys.readouterr().out


def test_nothing_passes_for_want_of_a_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(linear, "PLAIN_TOLERANCE", 0.0)
    path = tmp_path / "run.json"
    assert bench(*SIZES, "--dtype", "fp32", "--json", str(path)) == 1
    rows = {row.name: row for row in records.load(path, linear.LinearRecord).rows}
    assert rows[PLAIN].status == "wrong"


@pytest.mark.parametrize("what", ["wrong", "raises", "not installed", "too old"])
def test_a_peer_that_does_not_serve_is_a_row(what, monkeypatch):
    def loss(of):
        def run(hidden, weight):
            if what == "raises":
                raise RuntimeError("out of luck")
            return (
                1.05
                * dk.linear_policy_loss(hidden, weight, of.batch.target_ids, **of.arguments).loss
            )

        if what == "too old":
            raise ImportError("no such name")
        return run

    def version(distribution):
        if what == "not installed":
            raise metadata.PackageNotFoundError(distribution)
        return "1.0"

    monkeypatch.setitem(PEERS, "other", linear_rows.LinearPeer("other", "other", dk.dcpo, loss))
    monkeypatch.setattr(linear_rows.metadata, "version", version)
    rows = []
    plan = linear.Plan([], ["other"], 0.0, timing.CpuClock(0), cli.watch.CpuWatch)
    bar = linear.Bar()
    assert linear.run_case(CASE, [1], plan, bar, rows)
    status, note = {
        "wrong": ("wrong", "d_hidden is off by 5.0e-02"),
        "raises": ("wrong", "RuntimeError: out of luck"),
        "not installed": ("missing", "not installed (pip install other)"),
        "too old": ("missing", "can't be imported: no such name"),
    }[what]
    assert rows[-1].status == status and rows[-1].note.startswith(note)
    assert rows[-1].samples is None and rows[1].status == "ok"
    record = records.new("", None, [], linear.LinearRecord)
    record.rows.extend(rows)
    assert linear.show(cli.Screen(), cli.replace(record, complete=True), None) == 0


@pytest.mark.parametrize("slow", [0.0, math.inf])
def test_long_calls(slow, monkeypatch, tmp_path):
    """The first call is a sample; of one that is slow, too, the only one."""
    monkeypatch.setattr(linear, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(linear, "SLOW", slow)
    path = tmp_path / "run.json"
    assert bench(*SIZES, "--dtype", "fp32", "--chunks", "1", "--json", str(path)) == 0
    for row in records.load(path, linear.LinearRecord).rows:
        again = slow or row.name == PRODUCTS  # which stand before plain PyTorch
        assert len(row.samples) >= linear.MIN_ROUNDS if again else len(row.samples) == 1


def test_interrupted_run_keeps_what_was_measured(monkeypatch, tmp_path):
    clock = timing.CpuClock(0)
    sample, taken = clock.sample, []

    def interrupted(call):
        taken.append(call)
        if len(taken) == 40:  # in a later round than the first
            raise KeyboardInterrupt
        return sample(call)

    clock.sample = interrupted
    monkeypatch.setattr(timing, "CpuClock", lambda: clock)
    monkeypatch.setattr(linear, "MIN_ROUNDS", 100)
    path = tmp_path / "run.json"
    assert bench(*SIZES, "--dtype", "fp32", "--json", str(path)) == 130
    kept = records.load(path, linear.LinearRecord)
    assert not kept.complete and all(row.status == "ok" for row in kept.rows)


# ---- arguments -----------------------------------------------------------------------------------


def test_what_is_measured_unasked():
    shapes = {
        (case.tokens, case.width, case.vocab, case.dtype) for case in linear.cases(parsed(), "cpu")
    }
    assert shapes == {
        (n, d, v, dtype)
        for n, d, v in ((4096, 1024, 32768), (1024, 896, 151936))
        for dtype in ("bf16", "fp32")
    }
    (case,) = linear.cases(parsed("--tokens", "8", "--dtype", "fp16", "--chunks", "1"), "cpu")
    assert (case.tokens, case.width, case.vocab, case.dtype) == (8, 896, 151936, "fp16")
    cases = linear.cases(parsed("--width", "8,16", "--vocab", "9"), "cuda")
    assert [(case.tokens, case.width, case.dtype) for case in cases] == [
        (8192, 8, "bf16"),
        (8192, 16, "bf16"),
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("fused",), "linear has rows of its own: ask for it alone"),
        (("--objective", "grpo"), "--objective does not go with linear"),
        (("--zero-advantage", "0.5"), "--zero-advantage does not go with linear"),
        (("--backend", "eager"), "--backend does not go with linear"),
        (("--roofline", "100"), "--roofline does not go with linear"),
        (("--peers", "quack"), "--peers quack: has no head"),
        (("--tokens", "12"), "--tokens 12: must be a multiple of 8, the number of responses"),
        (("--tokens", "8", "--chunks", "9"), "--chunks: no more than there are tokens"),
    ],
)
def test_arguments_refused(arguments, problem, capsys):
    assert bench(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"dcpo bench: {problem}")


def test_its_arguments_go_with_nothing_else(capsys):
    args = parsed("--width", "8")
    args.operators = ["fused"]
    assert cli.main(args) == 2
    assert "--width and --chunks go with linear" in capsys.readouterr().err
