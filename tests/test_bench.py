"""The microbenchmark: inputs like production, a gate that shuts, peers that must agree first."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from bench_runs import CASE, OURS, bench, quick

from dcpo_kernels.bench import (
    check,
    cli,
    harness,
    implementations,
    inputs,
    peers,
    records,
    timing,
    watch,
)
from dcpo_kernels.bench.calls import Call
from dcpo_kernels.bench.operators import operators
from dcpo_kernels.bench.shapes import OBJECTIVES
from dcpo_kernels.bench.suites import loss

__all__ = ["quick"]


# ---- inputs --------------------------------------------------------------------------------------


def test_lengths():
    generator = torch.Generator().manual_seed(0)
    wanted = ((8, 256, 256), (8, 8, 1), (8, 200, 25), (3, 5, 4), (16, 8192, 512))
    for responses, total, most in wanted:
        lengths = inputs.real_lengths(responses, total, most, generator)
        assert len(lengths) == responses
        assert int(lengths.sum()) == total
        assert 1 <= int(lengths.min()) <= int(lengths.max()) <= most
    with pytest.raises(ValueError, match="can't have"):
        inputs.real_lengths(8, 100, 10, generator)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.25)], ids=["packed", "padded"])
def test_inputs_reach_every_objective(objective, shares):
    case = replace(CASE, objective=objective, zero_advantage=shares[0], masked=shares[1])
    data = inputs.make(case)
    assert data.logits.numel() == case.tokens * case.vocab
    rows = data.counting_rows()
    assert rows == round((1 - shares[1]) * case.tokens)
    assert (rows - data.counting_rows(True)) / rows == pytest.approx(shares[0], abs=0.2)
    p = torch.softmax(data.logits.float(), -1).amax(-1)
    assert p.max() > 0.95
    assert p.min() < 0.6
    operator = operators()["fused"]
    want = check.expected(operator, data)
    call = Call(operator, data, operator.ours(data, OURS, False))
    agreement = check.compare(*call(), want)
    assert agreement.ok, agreement
    plain = check.compare(*Call(operator, data, operator.plain(data))(), want)
    assert plain.ok, plain


def test_same_seed_same_inputs():
    a, b = inputs.make(CASE), inputs.make(CASE)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.old_logprobs, b.old_logprobs)


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("masked", [0.0, 0.25])
def test_reference_does_not_depend_on_chunks(monkeypatch, name, masked):
    operator = operators()[name]
    objective = "gspo" if operator.takes_objective else ""
    data = inputs.make(replace(CASE, operator=name, objective=objective, masked=masked))
    whole = check.expected(operator, data)
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    assert len(list(data.chunks())) > 1
    parts = check.expected(operator, data)
    torch.testing.assert_close(parts.value, whole.value)
    if operator.backward:
        torch.testing.assert_close(parts.gradient, whole.gradient)


@pytest.mark.parametrize("name", operators())
def test_minimum_bytes(name):
    operator = operators()[name]
    objective = "dcpo" if operator.takes_objective else ""
    row = CASE.vocab * 2
    case = replace(CASE, operator=name, objective=objective)
    for masked, count in ((0.0, 24), (0.25, 18)):
        floor = {"fused": row * (count + 24), "read": row * count, "listed": row * count}
        floor["replay"] = 2 * 64 * count + row * 24
        found = operator.minimum_bytes(inputs.make(replace(case, masked=masked)))
        assert found == floor.get(name, row * (2 * count + 24))
    if operator.takes_objective and name != "replay":
        gspo = inputs.make(replace(case, objective="gspo"))
        assert operator.minimum_bytes(gspo) == row * (2 * 24 + 24)


# ---- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "name", [n for n, o in operators().items() if o.backward and not o.only_ours]
)
def test_gate_opens_and_shuts(name, dtype):
    operator = operators()[name]
    objective = "dcpo" if operator.takes_objective else ""
    case = replace(CASE, operator=name, objective=objective, dtype=dtype, masked=0.25)
    data = inputs.make(case)
    want = check.expected(operator, data)
    value, gradient = Call(operator, data, operator.ours(data, OURS, False))()
    mask = data.mask

    def agrees(value, gradient) -> bool:
        return check.compare(value, gradient, want, mask, check.OUR_VALUE_TOLERANCE).ok

    assert agrees(value, gradient)
    assert not agrees(value * 1.001, gradient)
    assert not agrees(value * torch.nan, gradient)
    assert not agrees(value, gradient * 1.03)
    assert not agrees(value, -gradient)

    def spoiled(index, factor: float, offset: float = 0.0):
        other = gradient.clone()
        other[index] = other[index] * factor + offset
        return other

    padding = (~mask).nonzero()[0].tolist()
    assert not agrees(value, spoiled((*padding, 5), 1.0, 1e-3))
    assert not agrees(value, spoiled((0, 0, 7), 1.0, torch.nan))
    largest = int(gradient[0, 0].abs().argmax())
    assert not agrees(value, spoiled((0, 0, largest), 0.9))
    second = int(gradient[0, 0].abs().topk(2).indices[1])
    assert not agrees(value, spoiled((0, 0, second), 1.03))


def wrong_operator():
    """fused, with a gradient off by a twentieth in our implementation."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.05

    right = operators()["fused"]

    def ours(data, backend, inplace):
        function = right.ours(data, backend, False)
        return function if backend == "reference" else lambda logits: function(Off.apply(logits))

    return replace(right, ours=ours)


@pytest.mark.skipif(OURS != "cpu", reason="the compiled module is missing")
def test_wrong_kernel_is_not_timed_and_fails_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "operators", lambda: {"fused": wrong_operator()})
    path = tmp_path / "run.json"
    arguments = ("--tokens", "16", "--vocab", "503", "--backend", "cpu,eager", "--json", str(path))
    assert bench(*arguments) == 1
    rows = {row.name: row for row in records.load(path).rows}
    assert rows["cpu"].status == "wrong"
    assert 0.04 < rows["cpu"].agreement.gradient_error < 0.06
    assert "gradient off by" in rows["cpu"].note
    assert rows["cpu"].samples is None
    assert rows["eager"].status == "ok"
    assert "WRONG: cpu of fused" in capsys.readouterr().out


# ---- peers ---------------------------------------------------------------------------------------


def test_missing_peer_is_a_row(monkeypatch):
    def not_there(distribution):
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(peers.metadata, "version", not_there)
    data = inputs.make(CASE)
    for peer in peers.PEERS.values():
        row = peers.implementation(peer, operators()["fused"], data)
        assert row.make is None
        assert row.note == f"not installed (pip install {peer.distribution})"


def test_peer_without_the_feature_is_a_row(monkeypatch):
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "1.0")
    data = inputs.make(CASE)
    row = peers.implementation(peers.PEERS["liger"], operators()["fused"], data)
    assert (row.make, row.note) == (None, "has no dcpo")
    row = peers.implementation(peers.PEERS["quack"], operators()["fused"], data)
    assert (row.make, row.note) == (None, "does not run on cpu")


@pytest.fixture
def bench_peer(monkeypatch, tmp_path):
    """Rows of a small run in which somebody's log-probs are the only peer."""

    def run(change, *operators: str) -> list[records.Row]:
        def call(operator, data):
            function = implementations.peers.plain.logprobs(data.target_ids)
            return peers.from_logprobs(operator, data, lambda logits: change(function(logits)))

        other = {"other": peers.Peer("other", "torch", ("cpu",), peers.lacks_nothing, call)}
        monkeypatch.setattr(peers, "PEERS", other)
        monkeypatch.setattr(cli, "PEERS", other)
        path = tmp_path / "run.json"
        sizes = ("--tokens", "16", "--vocab", "503", "--backend", "eager", "--peers", "other")
        assert bench(*operators, *sizes, "--json", str(path)) == 0
        return records.load(path).rows

    return run


@pytest.mark.parametrize("factor", [1.0, 1.01], ids=["right", "wrong"])
def test_peer_must_agree(bench_peer, factor):
    """A peer that is wrong is a row that says by how much, and no reason for us to fail."""
    found = bench_peer(lambda logprobs: factor * logprobs, "fused", "two_pass", "read")
    rows = [row for row in found if row.name == "other"]
    assert len(rows) == 3
    for row in rows:
        assert row.status == ("ok" if factor == 1.0 else "wrong"), row
        assert row.version == torch.__version__.split("+")[0] or row.version
        assert ("value off by" in row.note) == (factor != 1.0)


def test_peer_that_raises_is_a_row(bench_peer):
    def fail(logprobs):
        raise RuntimeError("out of luck")

    rows = {row.name: row for row in bench_peer(fail)}
    assert rows["other"].status == "wrong"
    assert rows["other"].note == "RuntimeError: out of luck"
    assert rows["eager"].status == "ok"


@pytest.mark.parametrize("masked", [0.0, 0.25])
@pytest.mark.parametrize("name", peers.PEERS)
def test_adapter_agrees(name, masked):
    """With peers installed (a venv of their own): value and gradient of everything they have."""
    peer = peers.PEERS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    skipped = f"{peer.distribution} has nothing to show on {device}"
    compared = 0
    for operator in operators().values():
        for objective in ("dcpo", "grpo", "dapo", "gspo") if operator.takes_objective else ("",):
            what = {"operator": operator.name, "objective": objective, "dtype": "fp32"}
            case = loss(*CASE.shape, device, masked=masked, **what)
            row = peers.implementation(peer, operator, inputs.make(case))
            if row.make is None:
                skipped = row.note
                continue
            call = row.make()
            call.restore()
            want = check.expected(operator, call.inputs)
            agreement = check.compare(*call(), want, call.inputs.mask)
            assert agreement.ok, f"{case.describe()}: {agreement}"
            compared += 1
    if not compared:
        pytest.skip(f"{name}: {skipped}")


# ---- interruption and arguments ------------------------------------------------------------------


def test_interrupted_run_keeps_what_was_measured(monkeypatch, tmp_path):
    clock = timing.CpuClock(0)
    sample, taken = clock.sample, []

    def interrupted(call):
        taken.append(call)
        if len(taken) == 18:  # somewhere in the second case
            raise KeyboardInterrupt
        return sample(call)

    clock.sample = interrupted
    monkeypatch.setattr(timing, "CpuClock", lambda: clock)
    path = tmp_path / "run.json"
    status = bench("--tokens", "8,16,24", "--vocab", "503", "--backend", OURS, "--json", str(path))
    assert status == 130
    kept = records.load(path)
    assert not kept.complete
    assert {row.tokens for row in kept.rows} >= {8}
    done = [row for row in kept.rows if row.tokens == 8 and row.kind == "ours"]
    assert all(row.status == "ok" for row in done)


def test_interruption_while_preparing(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.memory, "peak_extra_bytes", interrupted)
    rows: list[records.Row] = []
    plan = harness.Plan([OURS], [], 0.0, timing.CpuClock(0), watch.CpuWatch)
    bar = SimpleNamespace(stage=lambda text: None, rounds=lambda rounds, share: None)
    assert not harness.run_case(CASE, operators()["fused"], plan, bar, rows)
    assert [row.status for row in rows] == ["interrupted"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vocab", "gpt5"),
        ("--masked", "1.5"),
        ("--dtype", "int8"),
        ("--peers", "nobody"),
        ("--seconds", "nan"),
        ("--roofline", "inf"),
    ],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert arguments[0] in capsys.readouterr().err


def test_unknown_operator(capsys):
    assert bench("softmax") == 2
    assert "softmax" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_is_found_first(option, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_measure", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    assert bench(option, str(tmp_path / "file" / "below" / "x")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dcpo bench: ") and line.endswith("can't be written: Not a directory")


def test_a_disk_that_fills_up_costs_no_results(tmp_path, monkeypatch, capsys):
    def full(record, path):
        raise OSError("disk full")

    monkeypatch.setattr(cli.records, "save", full)
    path = str(tmp_path / "run.json")
    sizes = ("--tokens", "16", "--vocab", "503", "--backend", "eager")
    assert bench(*sizes, "--json", path) != 0
    out = capsys.readouterr().out
    assert "disk full" in out and "eager" in out.partition("disk full")[2]


@pytest.mark.parametrize(
    "sizes",
    [
        ("--tokens", "1000000000000"),
        ("--vocab", "99999999999999999999"),
        ("--tokens", "4", "--vocab", "16", "--masked", "0.99"),
    ],
)
def test_sizes_that_no_inputs_have(sizes, capsys):
    assert bench(*sizes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dcpo bench: fused dcpo, ")
