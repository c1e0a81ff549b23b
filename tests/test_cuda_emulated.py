"""The CUDA kernels on a CPU (emulator/): every line of them, in several orders of execution, under
sanitizers. What only a GPU can say is in test_gpu.py and bench/gpu_check.py."""

from __future__ import annotations

import importlib
import subprocess

import emulator
import pytest
import test_golden
import test_hard_inputs
import torch
from problems import DTYPES, LAYOUTS, OBJECTIVES, assert_matches, pairs, problem

import dcpo_kernels as dk
from dcpo_kernels import backends
from dcpo_kernels.backends import _compiled, cuda

NAN, INF = float("nan"), float("inf")
SIZE = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}
STREAMING = 0


@pytest.fixture(autouse=True)
def emu(monkeypatch):
    yield emulator.install(monkeypatch)
    monkeypatch.undo()
    backends.unavailable.cache_clear()


# ---- both kernels, on what the others run on ----------------------------------------------------


@test_golden.token_groups
def test_golden_tokens(cases):
    test_golden.test_tokens_through_the_kernels(cases, "cuda")


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@test_golden.batches
def test_golden_batches(entry, dtype, layout):
    test_golden.test_batch_on_kernels(entry, dtype, layout, "cuda")


@pytest.fixture
def spread(monkeypatch):
    """Golden rows among as many -inf as a cluster wants: the results are the same."""
    original = test_golden.batch

    def wide(entry):
        objective, a = original(entry)
        vocab, wanted = entry["vocab"], 24576
        draw = torch.Generator().manual_seed(entry["vocab"])
        at = torch.randperm(wanted, generator=draw)[:vocab].sort().values
        for key, fill in (("logits", -INF), ("dlogits", 0.0)):
            x = torch.full((entry["tokens"], wanted), fill, dtype=a[key].dtype)
            x[:, at] = a[key]
            a[key] = x
        a["target_ids"] = at[a["target_ids"]]
        return objective, a

    monkeypatch.setattr(test_golden, "batch", wide)


# Rows of at least two chunks a warp.
@pytest.mark.parametrize(
    "dtype, blocks",
    [(dtype, blocks) for dtype in DTYPES for blocks in (1, 2, 4) if 2 * blocks <= 3 * SIZE[dtype]],
)
@pytest.mark.parametrize(
    "entry",
    [e for e in test_golden.BATCHES if "topk_ids" not in e and e["preset"] not in ("dppo", "gspo")],
    ids=lambda e: e["file"].removesuffix(".npz"),
)
def test_golden_batches_in_a_cluster(entry, dtype, blocks, spread, emu, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
    emu.set(seed=entry["tokens"] + blocks)
    test_golden.test_batch_on_kernels(entry, dtype, "packed", "cuda")


SETTINGS = pairs(
    objective=tuple(OBJECTIVES),
    layout=LAYOUTS,
    dtype=DTYPES,
    vocab=(37, 2056),
    temperature=(1.0, 0.7),
    kl_coef=(0.0, 0.05),
    entropy_coef=(0.0, 0.01),
    importance=(None, "token"),
    inplace=(False, True),
)


@pytest.mark.parametrize("case", SETTINGS, ids=lambda c: "-".join(map(str, c.values())))
def test_values_and_gradient(case):
    coefficients = {key: case[key] for key in ("kl_coef", "entropy_coef")}
    objective = OBJECTIVES[case["objective"]](**coefficients)
    keys = ("layout", "dtype", "vocab", "temperature", "importance")
    p = problem(objective, **{key: case[key] for key in keys})
    found = p.run(backend="cuda", inplace=case["inplace"], with_entropy=True)
    assert_matches(p, found, p.oracle(with_entropy=True))


@pytest.mark.parametrize("name, dtype", [("dcpo", torch.float32), ("gspo", torch.bfloat16)])
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradient_scales(name, dtype, inplace, layout):
    p = problem(OBJECTIVES[name](), layout=layout, dtype=dtype, vocab=43)
    found = p.run(upstream=lambda loss: 3 * loss, backend="cuda", inplace=inplace)
    assert_matches(p, found, p.oracle(), scale=3)


# ---- shapes: both kernels, every cluster size and stage count -----------------------------------


def check(vocab, dtype, *, rows=5, entropy=True, **options):
    objective = dk.dcpo(kl_coef=0.02, entropy_coef=0.01 if entropy else 0.0)
    lengths = (rows - rows // 2, 0, rows // 2)
    p = problem(objective, dtype=dtype, vocab=vocab, lengths=lengths, layout="packed")
    assert_matches(p, p.run(backend="cuda", **options), p.oracle())


# Around packs of 16 bytes, blocks of 256 to 1024 threads, and four packs a thread.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 255, 1003, 2049, 8191, 8200, 32771])
def test_streaming_any_vocabulary(vocab, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", STREAMING)
    check(vocab, dtype)


# Stages from the fewest that hold two chunks a warp; the fewest and the most rounds they allow; the
# row's last chunk full, or of 16 bytes and missing in all other warps. (Random batches, below, take
# what lies between.)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("stages", [4, 7, 14])
def test_cluster_any_stage_count(stages, blocks, emu, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
    shared = 8 * stages * (2048 + 8) + 2 * (blocks * 8 * 16 + 8)
    for rounds in sorted({2, stages - 2}):
        for row_bytes in (blocks * 16384 * rounds, blocks * 16384 * (rounds - 1) + 16):
            if row_bytes > 1 << 19:
                continue  # the same again, only longer
            # One cluster: its rows follow each other, more than there are slots for their sums.
            emu.set(seed=rounds, shared_bytes=shared, multiprocessors=blocks)
            dtype = DTYPES[(rounds + stages) % 3]
            check(row_bytes // SIZE[dtype], dtype, inplace=rounds == 2)


@pytest.mark.parametrize("seed", range(12))
def test_cluster_in_any_order(seed, emu, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", 1 + seed % 4)
    emu.set(seed=seed, multiprocessors=8)
    check(33280, DTYPES[seed % 3], rows=9, inplace=seed % 2 == 1, entropy=seed % 5 < 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, vocab", [(torch.bfloat16, 151936), (torch.float32, 151936)])
def test_real_vocabulary_by_the_table(dtype, vocab, emu):
    emu.set(multiprocessors=8)
    check(vocab, dtype, rows=4)


def test_a_row_larger_than_a_cluster_holds(emu):
    emu.set(shared_bytes=101376)
    assert emu.cuda_plan(8 * 16384 * 4, 9, 101376)["cluster"] == 8
    assert emu.cuda_plan(8 * 16384 * 4 + 16, 9, 101376)["cluster"] == 0
    check(8 * 16384 * 4 // 4 + 4, torch.float32, rows=2)


def test_same_bits_whatever_the_order_and_the_batch(emu, monkeypatch):
    p = problem(dk.dcpo(entropy_coef=0.01), vocab=16640, dtype=torch.bfloat16, lengths=(3, 2))
    for blocks in (STREAMING, 1, 2):
        monkeypatch.setattr(cuda, "cluster", blocks)
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
            p.base[1:2].clone(), **arguments, lengths=[1], objective=dk.dcpo(entropy_coef=0.01),
            backend="cuda",
        )  # fmt: skip
        if blocks == STREAMING:  # no gradient is asked for: always that kernel
            assert torch.equal(alone.logprobs, results[0][0][1:2])


def shifted_by(x, by):
    """The same rows, `by` elements after a 16-byte boundary."""
    memory = torch.zeros(x.numel() + 32, dtype=x.dtype)
    at = (-memory.data_ptr() % 16) // x.element_size() + by
    return memory[at : at + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 37, 1003, 8193, 33001, 33008])
def test_same_bits_wherever_a_row_begins(vocab, dtype, monkeypatch):
    """And whatever rows stand before it: where V is odd they move its first byte."""
    monkeypatch.setattr(cuda, "cluster", STREAMING)
    rows, ids = (2 * torch.randn(1, vocab)).to(dtype), torch.tensor([vocab // 2])
    results = []
    for by in range(16 // SIZE[dtype]):
        logits = shifted_by(rows, by)
        out, gradient = test_hard_inputs.run(
            logits, ids, objective=dk.dcpo(entropy_coef=0.1), with_entropy=True, backend="cuda"
        )
        found = dk.selected_logprobs(logits, ids, with_entropy=True, backend="cuda")
        results.append((out.token_loss, out.logprobs, out.entropy, gradient, *found))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("blocks", [1, 2])
def test_same_bits_wherever_a_row_of_a_cluster_begins(blocks, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
    rows, ids = torch.randn(3, 16640).bfloat16(), torch.tensor([1, 2, 3])
    found = [test_hard_inputs.run(shifted_by(rows, by), ids, backend="cuda") for by in (0, 8, 16)]
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
def test_rows_that_do_not_count_are_zeros(blocks, inplace, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
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
def test_advantage_zero_is_skipped(blocks, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
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


def no_check(monkeypatch, operator):
    """Ids reach the kernels unchecked, as on a GPU."""
    module = importlib.import_module(f"dcpo_kernels.ops.{operator}")
    monkeypatch.setattr(module, "check_ids", lambda *_: None)


@kernels
def test_an_id_out_of_range_makes_its_row_nan(blocks, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
    no_check(monkeypatch, "fused")
    logits, ids, old, advantages = batch()
    ids[1], ids[3], ids[4] = 2 * VOCAB, -100, 1 << 40
    bad = torch.tensor([False, True, False, True, True, False])
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(leaf, ids, old, advantages, lengths=[6], backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(out.token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


def test_an_id_out_of_range_in_selected_logprobs(monkeypatch):
    no_check(monkeypatch, "row_stats")
    logits, ids, _, _ = batch(vocab=333)
    ids[2] = 333
    leaf = logits.clone().requires_grad_()
    logprobs, _ = dk.selected_logprobs(leaf, ids, backend="cuda")
    logprobs.sum().backward()
    bad = torch.arange(6) == 2
    assert torch.equal(logprobs.isnan(), bad)
    assert torch.equal(leaf.grad.isnan().all(-1), bad) and leaf.grad[~bad].isfinite().all()


def test_a_listed_id_out_of_range_makes_its_row_nan(monkeypatch):
    no_check(monkeypatch, "fused")
    p = problem(OBJECTIVES["dppo-topk_tv"](), vocab=37)
    p.arguments["topk_ids"][3, 1] = 37
    out, gradient = p.run(backend="cuda")
    bad = torch.arange(24) == 3
    assert torch.equal(out.token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


@kernels
@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_broken_logit_breaks_its_row(poison, blocks, monkeypatch):
    monkeypatch.setattr(cuda, "cluster", blocks)
    logits, ids, old, advantages = batch()
    ids[2] = 7
    logits[2, 2 * VOCAB - 1] = poison
    leaf = logits.clone().requires_grad_()
    out = dk.policy_loss(leaf, ids, old, advantages, lengths=[6], backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    bad = torch.arange(6) == 2
    assert torch.equal(out.token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


# ---- inputs that hurt ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["both", "old", "new"])
@pytest.mark.parametrize("low", test_hard_inputs.LOWS, ids=str)
@pytest.mark.parametrize("name", ["kl", "tv"])
def test_masked_logits_in_a_full_divergence(name, low, where):
    test_hard_inputs.test_masked_logits_in_a_full_divergence(name, low, where, "cuda")


@pytest.mark.parametrize("vocab", [1003, 8192, 151_936])
def test_what_stands_beside_a_peak(vocab):
    test_hard_inputs.test_what_stands_beside_a_peak(vocab, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan", "inf"])
def test_a_poisoned_logit_stays_in_its_row(poison, dtype):
    test_hard_inputs.test_a_poisoned_logit_stays_in_its_row(poison, dtype, "cuda")


@kernels
def test_what_stands_beside_a_peak_in_the_gradient(blocks, monkeypatch):
    """The same of `fused`, in each of its kernels."""
    monkeypatch.setattr(cuda, "cluster", blocks)
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


# ---- row_stats and row_gradient -----------------------------------------------------------------


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 1003, 4096, 40001])
def test_selected_logprobs(vocab, dtype, with_entropy):
    logits, ids, _, _ = batch(vocab=vocab, dtype=dtype)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    results = []
    for backend, x in (("reference", logits.double()), ("cuda", logits)):
        leaf = x.clone().requires_grad_()
        logprobs, entropy = dk.selected_logprobs(
            leaf, ids, mask=mask, temperature=0.8, with_entropy=with_entropy, backend=backend
        )
        loss = (logprobs * torch.arange(6)).sum()
        if with_entropy:
            loss = loss + 0.3 * entropy.sum()
        loss.backward()
        results.append((logprobs, entropy, leaf.grad))
    (want, want_entropy, want_gradient), (found, entropy, gradient) = results
    torch.testing.assert_close(found.double(), want, rtol=2e-6, atol=3e-6)
    if with_entropy:
        torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-6, atol=4e-6)
    rounding = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    slack = rounding * want_gradient.abs() + 1e-5 * 8 + (2**-24 if SIZE[dtype] == 2 else 0)
    assert ((gradient.double() - want_gradient).abs() <= slack).all()


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "major, shared, row_bytes, cluster, stages",
    [
        (9, 232448, 32000 * 2, 1, 14),
        (9, 232448, 128256 * 2, 2, 14),
        (9, 232448, 151936 * 2, 4, 14),
        (9, 232448, 151936 * 4, 8, 14),
        (9, 232448, 262144 * 2, 4, 14),
        (10, 232448, 151936 * 2, 4, 14),
        (12, 101376, 128256 * 2, 8, 6),
        (12, 101376, 151936 * 4, 0, 0),
        (8, 166912, 151936 * 2, 0, 0),
        (9, 232448, 16384, 0, 0),
    ],
)
def test_table(major, shared, row_bytes, cluster, stages, emu):
    plan = emu.cuda_plan(row_bytes, major, shared)
    assert (plan["cluster"], plan["stages"]) == (cluster, stages)
    if cluster:
        assert plan["shared_bytes"] <= shared
        assert plan["rounds"] * cluster * 16384 >= row_bytes
        assert plan["rounds"] + plan["slack"] + 2 <= plan["stages"]
        assert plan["slack"] + 2 <= plan["rounds"]


@pytest.mark.skipif(
    _compiled.C is None or not _compiled.C.cuda or torch.cuda.is_available(),
    reason="needs a module built with CUDA, and no GPU",
)
def test_without_a_driver():
    assert _compiled.C.cuda_devices() == []
    assert "driver" in _compiled.C.cuda_why_not(0)
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*driver"):
        _compiled.C.cuda_multiply(
            rows=1, vocab=1, dtype=2, x=(16, 1, 0, 0), factor=16, device=0, stream=0
        )


# ---- under sanitizers ---------------------------------------------------------------------------


def stress(program, *arguments):
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=300
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
def test_a_missing_barrier_is_a_data_race():
    flags = (*THREADS, "-DDCPO_EMU_WITHOUT_SYNCTHREADS")
    program = emulator.build("stress", emulator.STRESS, *flags)
    # Threads of the system run as they like: one run in some need not show it.
    runs = (stress(program, seed, 1, "streaming") for seed in range(10))
    assert any(done.returncode != 0 and "data race" in done.stderr for done in runs)


@pytest.mark.slow
def test_a_missing_warp_barrier_is_noticed():
    program = emulator.build("stress", emulator.STRESS, "-O0", "-DDCPO_EMU_WITHOUT_SYNCWARP")
    done = stress(program, 0, 20, "cluster")
    assert done.returncode != 0 and "has not fenced" in done.stdout + done.stderr
