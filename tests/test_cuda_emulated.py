"""What is the CUDA kernels' alone, on a CPU (emulator/): both kernels of `fused`, every cluster
size and stage count, several orders of execution, sanitizers. What they compute is in the tests of
every backend; what only a GPU can say in test_gpu.py."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import emulator
import golden
import pytest
import torch
from backends import needs_kernels
from bench_runs import CASE
from numerics import INF, NAN, run
from problems import DTYPES, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels import backends, info
from dcpo_kernels.backends import _compiled, cuda
from dcpo_kernels.bench import implementations, inputs
from dcpo_kernels.bench.operators import operators

SIZE = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}
STREAMING = 0


@pytest.fixture(autouse=True)
def emu():
    with emulator.installed() as module:
        yield module


@pytest.fixture
def hold(monkeypatch):
    """hold(blocks): from then on so many blocks hold a row of `fused`."""
    fused = cuda.fused
    return lambda blocks: monkeypatch.setattr(cuda, "fused", partial(fused, cluster=blocks))


@pytest.mark.parametrize("quarters", [1, 2])
def test_exponentials_by_multiply_adds(quarters, emu, monkeypatch):
    """A gradient in bf16 moves by one rounding at most, and nothing else moves."""
    p = problem(dk.dcpo(), dtype=torch.bfloat16, vocab=8192, lengths=(3, 2))
    p.base[:, ::7] = -INF
    p.base[torch.arange(5), p.arguments["target_ids"]] = 1.0
    expected, want = p.run(backend="cuda")
    monkeypatch.setattr(cuda, "fused", partial(cuda.fused, polynomial=quarters))
    out, gradient = p.run(backend="cuda")
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logprobs, expected.logprobs)
    steps = (gradient.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert steps.max() == 1 and (steps > 0).float().mean() < 0.05
    assert (gradient[p.base == -INF] == 0).all()


@pytest.mark.parametrize("dtype, blocks", list(zip(DTYPES, (1, 2, 4), strict=True)))
@pytest.mark.parametrize(
    "name",
    [name for name, e in golden.BATCHES.items() if e["preset"] not in ("dppo", "gspo")],
)
def test_golden_batches_in_a_cluster(name, dtype, blocks, emu, hold):
    """Golden rows among so many -inf that each block has some: the results are the same."""
    entry = golden.BATCHES[name]
    a = golden.arrays(entry)
    draw = torch.Generator().manual_seed(entry["vocab"])
    at = torch.randperm(8192, generator=draw)[: entry["vocab"]].sort().values
    for key, fill in (("logits", -INF), ("dlogits", 0.0)):
        narrow, a[key] = a[key], torch.full((entry["tokens"], 8192), fill, dtype=a[key].dtype)
        a[key][:, at] = narrow
    a["target_ids"] = at[a["target_ids"]]
    hold(blocks)
    emu.set(seed=entry["tokens"] + blocks)
    golden.check(entry, a, dtype, "packed", "cuda")


# ---- shapes: both kernels, every cluster size and stage count -----------------------------------


def check(vocab, dtype, *, rows=5, entropy=True, **options):
    objective = dk.dcpo(kl_coef=0.02, entropy_coef=0.01 if entropy else 0.0)
    lengths = (rows - rows // 2, 0, rows // 2)
    p = problem(objective, dtype=dtype, vocab=vocab, lengths=lengths, layout="packed")
    assert_matches(p, p.run(backend="cuda", **options), p.oracle())


# Around packs of 16 bytes, blocks of 256 to 1024 threads, and four packs a thread.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 255, 1003, 2049, 8191, 8200, 32771])
def test_streaming_any_vocabulary(vocab, dtype, hold):
    hold(STREAMING)
    check(vocab, dtype)


# Packs of a row: fewer than blocks, slices that are empty or of one pack, around a warp's tile of
# 128 packs and around one for each warp, and more threads from 40 KiB on.
PACKS = [1, 7, 9, 127, 128, 129, 8 * 128 - 1, 8 * 128, 9 * 128 + 1, 2561, 3 * 1281]


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("packs", PACKS)
def test_resident_any_slice(packs, blocks, emu, hold):
    hold(blocks)
    emu.set(seed=packs)
    for dtype in DTYPES:
        check(packs * 16 // SIZE[dtype], dtype, rows=4, inplace=blocks % 4 == 0)


@pytest.mark.parametrize("seed", range(12))
def test_resident_in_any_order(seed, emu, hold):
    hold(2 ** (seed % 4))
    emu.set(seed=seed)
    check(33280, DTYPES[seed % 3], rows=9, inplace=seed % 2 == 1, entropy=seed % 5 < 3)


@pytest.mark.parametrize("blocks", [STREAMING, 1, 2, 4])
def test_many_rows_to_a_multiprocessor(blocks, emu, hold, poisoned):
    hold(blocks)
    emu.set(multiprocessors=1)
    for inplace in (False, True):
        check(2056, torch.bfloat16, rows=25, inplace=inplace)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, vocab", [(torch.bfloat16, 151936), (torch.float32, 151936)])
def test_real_vocabulary_by_the_table(dtype, vocab):
    check(vocab, dtype, rows=4)


def test_a_row_larger_than_a_cluster_holds(emu):
    emu.set(shared_bytes=16768)
    assert cuda.plan(32768, 4, 0) == "holds a row in 8 blocks"
    assert cuda.plan(32772, 4, 0) == "streams rows"
    assert cuda.plan(32767, 2, 0) == "streams rows that can't all begin on 16 bytes"
    check(32772, torch.float32, rows=2)


def test_same_bits_whatever_the_order_and_the_batch(emu, hold):
    p = problem(dk.dcpo(entropy_coef=0.01), vocab=16640, dtype=torch.bfloat16, lengths=(3, 2))
    for blocks in (STREAMING, 1, 2):
        hold(blocks)
        results = []
        for seed, gpus in ((1, 2), (2, 4), (3, 8)):
            emu.set(seed=seed, multiprocessors=gpus)
            out, gradient = p.run(backend="cuda")
            results.append((out.logprobs, out.entropy, gradient))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
        # the second row alone
        arguments = {k: v[1:2] for k, v in p.arguments.items() if k not in ("lengths", "objective")
                     and isinstance(v, torch.Tensor)}  # fmt: skip
        alone = dk.policy_loss(
            p.base[1:2].clone().requires_grad_(), **arguments, lengths=[1],
            objective=dk.dcpo(entropy_coef=0.01), backend="cuda",
        )  # fmt: skip
        assert torch.equal(alone.logprobs, results[0][0][1:2])
        assert torch.equal(alone.entropy, results[0][1][1:2])


def shifted_by(x, by):
    """The same rows, `by` elements after a 16-byte boundary."""
    memory = torch.zeros(x.numel() + 32, dtype=x.dtype)
    at = (-memory.data_ptr() % 16) // x.element_size() + by
    return memory[at : at + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 37, 1003, 8193, 33001, 33008])
def test_same_bits_wherever_a_row_begins(vocab, dtype, hold):
    """And whatever rows stand before it: where V is odd they move its first byte."""
    hold(STREAMING)
    rows, ids = (2 * torch.randn(1, vocab)).to(dtype), torch.tensor([vocab // 2])
    results = []
    for by in range(16 // SIZE[dtype]):
        logits = shifted_by(rows, by)
        out, gradient = run(
            logits, ids, objective=dk.dcpo(entropy_coef=0.1), with_entropy=True, backend="cuda"
        )
        found = dk.selected_logprobs(logits, ids, with_entropy=True, backend="cuda")
        results.append((out.token_loss, out.logprobs, out.entropy, gradient, *found))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("blocks", [1, 2])
def test_same_bits_wherever_a_row_of_a_cluster_begins(blocks, hold):
    hold(blocks)
    rows, ids = torch.randn(3, 16640).bfloat16(), torch.tensor([1, 2, 3])
    found = [run(shifted_by(rows, by), ids, backend="cuda") for by in (0, 8, 16)]
    for out, gradient in found[1:]:
        assert torch.equal(out.logprobs, found[0][0].logprobs)
        assert torch.equal(gradient, found[0][1])


# ---- rows that don't count, and rows that are broken --------------------------------------------

kernels = pytest.mark.parametrize("blocks", [STREAMING, 1, 2], ids=["streaming", "one", "two"])
VOCAB = 8456  # two chunks a warp and a bit, in float32 over two blocks


def batch(vocab=2 * VOCAB, rows=6, dtype=torch.float32):
    logits = 2 * torch.randn(rows, vocab, dtype=torch.float32).to(dtype)
    ids = torch.randint(0, vocab, (rows,))
    old = torch.log_softmax(logits.float(), -1).gather(1, ids[:, None])[:, 0]
    return logits, ids, old, torch.randn(rows)


@kernels
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_rows_that_do_not_count_are_zeros(blocks, inplace, hold):
    hold(blocks)
    logits, ids, old, advantages = (x[None] for x in batch(rows=40))
    mask = torch.rand(1, 40) < 0.3
    logits[~mask], ids[~mask], old[~mask] = NAN, -100, NAN
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(
        leaf * 1, ids, old, advantages, mask=mask, backend="cuda", inplace=inplace,
        with_entropy=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert (gradient[~mask] == 0).all() and gradient[mask].abs().amax(-1).min() > 0
    assert (out.ratio[~mask] == 1).all()
    for x in (out.token_loss, out.logprobs, out.entropy, out.clipped):
        assert (x[~mask] == 0).all()
    assert out.loss.isfinite()


@kernels
def test_advantage_zero_is_skipped(blocks, hold):
    hold(blocks)
    logits, ids, old, advantages = batch()
    advantages[::2] = 0
    logits[::2] = NAN  # not read
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(
        leaf, ids, old, advantages, lengths=[6], skip_zero_advantage=True, backend="cuda"
    )
    out.loss.backward()
    assert (leaf.grad[::2] == 0).all() and (leaf.grad[1::2] != 0).any()
    assert out.loss.isfinite()


@kernels
def test_an_id_out_of_range_makes_its_row_nan(blocks, unchecked_ids, hold):
    hold(blocks)
    logits, ids, old, advantages = batch()
    ids[1], ids[3], ids[4] = 2 * VOCAB, -100, 1 << 40
    bad = torch.tensor([False, True, False, True, True, False])
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(leaf, ids, old, advantages, lengths=[6], backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(out.token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


@kernels
@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_broken_logit_breaks_its_row(poison, blocks, hold):
    hold(blocks)
    logits, ids, old, advantages = batch()
    ids[2] = 7
    logits[2, 2 * VOCAB - 1] = poison
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(leaf, ids, old, advantages, lengths=[6], backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    bad = torch.arange(6) == 2
    assert torch.equal(out.token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


@kernels
def test_what_stands_beside_a_peak_in_the_gradient(blocks, hold):
    """The same of `fused`, in each of its kernels."""
    hold(blocks)
    logits, ids, _, _ = batch()
    peaks = torch.tensor([12.0, 17.0, 20.0, 30.0, 40.0, 60.0])
    logits = (logits / 2).scatter(1, ids[:, None], peaks[:, None])
    leaf = logits.clone().requires_grad_()
    objective = dk.cispo(aggregation="token-sum")
    out = dk.policy_loss(
        leaf, ids, torch.zeros(6), -torch.ones(6), lengths=[6], objective=objective, backend="cuda"
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    rest = (logits.double() - peaks[:, None]).exp().scatter(1, ids[:, None], 0.0).sum(1)
    off = (out.logprobs.double() / -rest.log1p() - 1).abs()
    assert (off < 0.01).all(), f"log p: {off.tolist()}"
    p = 1 / (1 + rest)
    off = (gradient.gather(1, ids[:, None])[:, 0].double() / (p * rest * p) - 1).abs()
    assert (off < 0.01).all(), f"1 - p: {off.tolist()}"


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "major, shared, row_bytes, cluster, threads, held",
    [
        (9, 232448, 8192 * 2, 1, 128, 8),
        (9, 232448, 32000 * 2, 1, 256, 3),
        (9, 232448, 128256 * 2, 4, 256, 3),
        (9, 232448, 151936 * 2, 4, 256, 3),
        (9, 232448, 151936 * 4, 8, 256, 3),
        (9, 232448, 262144 * 2, 8, 256, 3),
        (9, 232448, 262144 * 4, 8, 256, 1),
        (10, 232448, 32000 * 2, 2, 128, 6),
        (10, 232448, 128256 * 2, 8, 128, 6),
        (10, 232448, 151936 * 2, 8, 128, 5),
        (12, 101376, 128256 * 2, 8, 128, 3),
        (12, 101376, 151936 * 2, 8, 128, 2),
        (12, 101376, 262144 * 4, 0, 0, 0),
        (8, 166912, 151936 * 2, 0, 0, 0),
    ],
)
def test_table(major, shared, row_bytes, cluster, threads, held, emu):
    emu.set(major=major, shared_bytes=shared)
    plan = emu.cuda_plan(row_bytes, 0)
    assert (plan["cluster"], plan["threads"]) == (cluster, threads)
    if cluster:
        assert 16 * plan["slice"] * cluster >= row_bytes and plan["shared_bytes"] <= shared
        by_registers = 1024 // threads
        assert min((shared + 1024) // (plan["shared_bytes"] + 1024), by_registers) == held


@needs_kernels
def test_info_and_the_benchmark_say_which_kernel_runs(emu, monkeypatch):
    there = {name: getattr(_compiled.C, name) for name in dir(_compiled.C)}
    there |= {name: getattr(emu, name) for name in ("cuda", "cuda_devices", "cuda_versions")}
    monkeypatch.setattr(_compiled, "C", SimpleNamespace(**there))
    monkeypatch.setattr(backends, "unavailable", lambda *_: "")
    said = info._text(info.collect())
    assert "(V = 151,936 in bf16: holds a row in 4 blocks)" in said
    assert "(V = 262,144 in bf16: holds a row in 8 blocks)" in said
    for vocab, what in (
        (503, "streams rows that can't all begin on 16 bytes"),
        (504, "streams rows"),
    ):
        data = inputs.make(replace(CASE, vocab=vocab))
        assert implementations._kernel(operators()["fused"], data, cluster=0) == what
    assert implementations._kernel(operators()["fused"], data, 2) == "holds a row in 2 blocks"
    assert implementations._kernel(operators()["read"], data) == ""


@pytest.mark.skipif(
    _compiled.C is None or not _compiled.C.cuda or torch.cuda.is_available(),
    reason="needs a module built with CUDA, and no GPU",
)
def test_without_a_driver():
    assert _compiled.C.cuda_devices() == []
    assert _compiled.C.cuda_versions()["runtime"] >= 11000
    assert "driver" in _compiled.C.cuda_why_not(0)
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*driver"):
        _compiled.C.cuda_multiply(
            rows=1, vocab=1, dtype=2, x=(16, 1, 0, 0), factor=16, device=0, stream=0
        )


# ---- under sanitizers ---------------------------------------------------------------------------


def stress(program, *arguments, **variables):
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )


def test_random_batches():
    done = stress(emulator.build("stress", emulator.STRESS), 0, 500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_random_batches_under_address_and_undefined_behaviour_sanitizers():
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = stress(emulator.build("stress", emulator.STRESS, *flags), 10_000, 100)
    assert done.returncode == 0, done.stdout + done.stderr


THREADS = ("-fsanitize=thread", "-DDCPO_EMU_THREADS")


@pytest.mark.slow
def test_random_batches_with_a_thread_of_the_system_for_each(tmp_path):
    done = stress(emulator.build("stress", emulator.STRESS, *THREADS), 0, 15)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_a_missing_barrier_is_a_data_race(kind):
    program = emulator.build("stress", emulator.STRESS, *THREADS)
    # Threads of the system run as they like: one run in some need not show it.
    without = {"DCPO_EMU_WITHOUT_SYNCTHREADS": "1"}
    runs = (stress(program, seed, 1, kind, **without) for seed in range(10))
    assert any(done.returncode != 0 and "data race" in done.stderr for done in runs)
