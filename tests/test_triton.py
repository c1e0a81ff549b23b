"""The Triton kernels without a GPU: run in the interpreter, against the golden values and float64,
and compiled for GPUs that aren't here (tests/aot.py)."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_golden
import test_hard_inputs
import torch
from problems import DTYPES, OBJECTIVES, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels import backends, ops
from dcpo_kernels.backends import triton
from dcpo_kernels.objective import AGGREGATIONS
from dcpo_kernels.ops.records import Options, Rows, Tokens

INF, NAN = float("inf"), float("nan")
reason = backends.unavailable("triton", "cpu")
interpreted = pytest.mark.skipif(bool(reason), reason=f"Triton's interpreter: {reason}")
compiles = pytest.mark.skipif("triton" in reason, reason=reason)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
on_two_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


# ---- golden values ------------------------------------------------------------------------------


@interpreted
@test_golden.token_groups
def test_golden_tokens(cases):
    test_golden.test_tokens_through_the_kernels(cases, "triton")


@interpreted
@pytest.mark.parametrize(
    ("dtype", "layout"), [(FP32, "packed"), (BF16, "padded"), (FP16, "packed")], ids=str
)
@test_golden.batches
def test_golden_batches(entry, dtype, layout):
    test_golden.test_batch_on_kernels(entry, dtype, layout, "triton")


# ---- every objective against float64 ------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, aggregation):
    for seed, dtype in enumerate(DTYPES):
        for layout in ("packed", "padded"):
            coefficients = {"kl_coef": 0.05 * (dtype == BF16), "entropy_coef": 0.01 * seed}
            objective = OBJECTIVES[name](aggregation=aggregation, **coefficients)
            p = problem(
                objective,
                layout=layout,
                dtype=dtype,
                lengths=(3, 0, 2),
                temperature=0.8,
                importance="token" if seed == 0 else None,
                seed=seed,
            )
            assert_matches(p, p.run(backend="triton"), p.oracle())


@interpreted
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
@pytest.mark.parametrize("layout", ["row-stride", "sliced", "time-major"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "dppo-kl"])
def test_strided_rows(name, layout, inplace):
    """vocab 24: rows on 16 bytes; 37: anywhere; row-stride 37 + 3: the logits' on 16, not their
    gradient's."""
    for vocab, dtype in ((24, FP32), (24, BF16), (37, FP32), (37, FP16)):
        p = problem(OBJECTIVES[name](), layout=layout, dtype=dtype, lengths=(3, 1), vocab=vocab)
        found = p.run(backend="triton", inplace=inplace)
        assert_matches(p, found, p.oracle())
        if inplace:
            assert torch.equal(found[1], p.run(backend="triton")[1])


@interpreted
@pytest.mark.parametrize("k", [1, 20, 128])
@pytest.mark.parametrize("name", ["dppo-topk_tv", "dppo-topk_kl"])
def test_topk_with_and_without_the_sampled_token(name, k):
    p = problem(OBJECTIVES[name](), vocab=300, lengths=(8,), drift=1.5)
    old = torch.log_softmax(p.base, 1)
    top = old.topk(k)
    listed = (top.indices == p.arguments["target_ids"][:, None]).any(1)
    assert k == 128 or not listed.all()
    p.arguments["target_ids"][:4] = top.indices[:4, -1]
    p.arguments |= {"topk_ids": top.indices, "topk_logprobs": top.values}
    assert_matches(p, p.run(backend="triton"), p.oracle())


# ---- rows of several tiles, and their tails -----------------------------------------------------

# One lane and less, the smallest block and beside it, one and several tiles of every kernel.
VOCABS = [1, 2, 17, 511, 512, 513, 1003, 8192, 8193, 32768, 32769, 40008, 81928]


def hard_rows(vocab: int) -> torch.Tensor:
    rows = torch.randn(7, vocab)
    rows[0] -= 60  # a tail that adds exp(0) shows
    rows[1], rows[1, -1] = -60.0, 0.0  # the peak in the last column
    rows[2] = torch.linspace(-30, 30, vocab)  # the maximum keeps rising
    rows[3] += 1e4
    rows[4, : vocab * 3 // 4] = -INF  # lanes and tiles without a logit
    rows[5, vocab // 4 + 1 :] = -INF
    rows[6, ::2] = -INF
    rows[6, -1] = 20.0
    return rows


@interpreted
@on_two_dtypes
@pytest.mark.parametrize("vocab", VOCABS)
def test_selected_logprobs_of_hard_rows(vocab, dtype):
    rows = hard_rows(vocab).to(dtype)
    ids = [0, vocab - 1, vocab // 2, vocab // 3, vocab - 1, vocab // 4, vocab - 1]
    test_hard_inputs.assert_selected(rows, ids, "triton", temperature=0.7)


@interpreted
@on_two_dtypes
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("vocab", [513, 8193, 32769, 40008, 81928])
def test_policy_loss_of_hard_rows(vocab, entropy_coef, dtype):
    p = problem(dk.dcpo(entropy_coef=entropy_coef), dtype=dtype, lengths=(7,), vocab=16)
    p.base = hard_rows(vocab).to(dtype)
    p.arguments["target_ids"] = torch.tensor([0, vocab - 1, vocab // 2, 1, vocab - 1, 0, vocab - 1])
    assert_matches(p, p.run(backend="triton"), p.oracle())
    assert_matches(p, p.run(backend="triton", inplace=True), p.oracle())


@interpreted
@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl"])
def test_full_divergence_over_several_tiles(name):
    p = problem(OBJECTIVES[name](), lengths=(4, 4), vocab=33001, drift=0.3)
    out, gradient = p.run(backend="triton")
    assert_matches(p, (out, gradient), p.oracle())


@interpreted
def test_more_rows_than_a_grid_dimension_holds():
    test_hard_inputs.test_more_rows_than_a_grid_dimension_holds(BF16, "triton")


@interpreted
@pytest.mark.parametrize("vocab", [40, 37, 40008])
def test_a_row_alone_has_the_same_bits(vocab):
    p = problem(dk.dcpo(entropy_coef=0.1), vocab=vocab, lengths=(5,), dtype=BF16)
    a = p.arguments
    rows = Rows(a["target_ids"], None, None, None, None)
    tokens = Tokens(a["old_logprobs"], a["advantages"], torch.ones(5), None, None)
    rest = (*rows, *tokens, *a["objective"].numbers, *Options(1.0, True), True, "triton")
    together = ops.fused(p.base, *rest)
    part = (x[3:4] if isinstance(x, torch.Tensor) else x for x in rest)
    alone = ops.fused(p.base[3:4], *part)
    assert all(torch.equal(x[3:4], y) for x, y in zip(together, alone, strict=True))


# ---- rows that don't count, ids that don't exist ------------------------------------------------


@interpreted
def test_idle_rows_are_not_read():
    p = problem(dk.dcpo(), lengths=(3, 3), vocab=40)
    p.arguments["advantages"][[1, 4]] = 0.0
    expected, gradient = p.run(backend="triton", with_entropy=True)
    p.base[[1, 4]] = NAN
    out, gradient2 = p.run(backend="triton", with_entropy=True, skip_zero_advantage=True)
    assert (gradient2[[1, 4]] == 0).all() and (out.entropy[[1, 4]] == 0).all()
    assert (out.ratio[[1, 4]] == 1).all() and (out.logprobs[[1, 4]] == 0).all()
    assert torch.equal(gradient2, gradient) and torch.equal(out.token_loss, expected.token_loss)
    # With a KL term they do pull.
    p = problem(dk.dcpo(kl_coef=0.1), lengths=(3, 3), vocab=40)
    p.arguments["advantages"][1] = 0.0
    _, gradient = p.run(backend="triton", skip_zero_advantage=True)
    assert (gradient[1] != 0).any()


@interpreted
def test_read_and_decide_only():
    p = problem(dk.dcpo(entropy_coef=0.1), lengths=(3, 1))
    with torch.no_grad():
        out = dk.policy_loss(p.base, **p.arguments, backend="triton")
    expected, _ = p.run(backend="triton")
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.entropy, expected.entropy)


@pytest.fixture
def unchecked(monkeypatch):
    """As on a GPU, where looking at an id would mean waiting for it."""
    for name in ("fused", "row_stats"):
        module = importlib.import_module(f"dcpo_kernels.ops.{name}")
        monkeypatch.setattr(module, "check_ids", lambda *_: None)


@interpreted
@pytest.mark.parametrize("bad", [-1, -100, 37, 2**40])
def test_an_id_outside_the_vocabulary_makes_its_row_nan(bad, unchecked):
    for objective, argument in ((dk.dcpo(), "target_ids"), (dk.dppo("topk_tv"), "topk_ids")):
        p = problem(objective, lengths=(3, 2))
        _, clean_gradient = p.run(backend="triton")
        p.arguments[argument][1 if argument == "target_ids" else (1, 2)] = bad
        out, gradient = p.run(backend="triton")
        assert torch.equal(out.token_loss.isnan(), torch.arange(5) == 1)
        assert gradient[1].isnan().all()
        assert torch.equal(gradient[[0, 2, 3, 4]], clean_gradient[[0, 2, 3, 4]])

    leaf = p.base.clone().requires_grad_()
    ids = p.arguments["target_ids"].clone()
    ids[1] = bad
    logprobs, _ = dk.selected_logprobs(leaf, ids, backend="triton")
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(logprobs.isnan(), torch.arange(5) == 1)
    assert torch.equal(gradient.isnan().all(1), torch.arange(5) == 1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [40, 37])
def test_upstream_gradients(vocab, dtype):
    p = problem(dk.dcpo(), layout="sliced", dtype=dtype, lengths=(3, 2), vocab=vocab)
    for scale in (1.0, -3.0, 0.0):
        for inplace in (False, True):
            found = p.run(lambda loss, s=scale: s * loss, backend="triton", inplace=inplace)
            assert_matches(p, found, p.oracle(), scale)


# ---- choice of backend --------------------------------------------------------------------------


def run_python(*arguments: str) -> str:
    """In a process that never heard of the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_leaves_triton_alone():
    run_python("-c", "import dcpo_kernels, sys; assert 'triton' not in sys.modules")


@interpreted
def test_the_interpreter_is_never_chosen():
    assert backends.choose("auto", "cpu") != "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        backends.choose("triton", "cuda")
    (row,) = (row for row in backends.explain() if row["tensor"] == "cpu")
    assert {"triton"} == {o["backend"] for o in row["others"]} - {"cpu", "reference"}


def test_why_it_can_not_serve_a_cpu_tensor():
    say = "from dcpo_kernels import backends; print(backends.unavailable('triton', 'cpu'))"
    assert "TRITON_INTERPRET=1" in run_python("-c", say) or "triton" in reason


# ---- compiled for GPUs that aren't here ---------------------------------------------------------


@functools.cache
def compiled(arch: str) -> list[dict[str, Any]]:
    entries = json.loads(run_python("aot.py", arch, "all"))
    assert {entry["kernel"] for entry in entries} == {
        "fused",
        "row_stats",
        "row_gradient",
        "multiply_",
    }
    return entries


# Sweeps of a row: unmasked, the tail, and the tile that is loaded once.
LOADS = {"fused": 4, "row_stats": 2, "row_gradient": 3, "multiply_": 1}
STORES = {"fused": 3, "row_stats": 0, "row_gradient": 3, "multiply_": 1}
SCALARS = {
    "fused": 12,
    "row_stats": 4,
    "row_gradient": 8,
    "multiply_": 1,
}  # of one value per row


def on(*archs: str):
    """Those of one GPU go to one worker: they look at the same kernels."""
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in archs]
    )


NVIDIA = on("sm_80", "sm_90", "sm_100", "sm_120")


@compiles
@NVIDIA
def test_loads_and_stores_are_16_bytes_where_rows_allow_it(arch):
    for entry in compiled(arch):
        kernel, vectors = entry["kernel"], entry["vectors"]
        if entry["aligned"]:
            loads, stores = (LOADS[kernel], STORES[kernel]) if entry["writes"] else (2, 0)
            assert entry["wide_loads"] >= loads * vectors, entry
            assert entry["wide_stores"] >= stores * vectors, entry
            assert entry["other_loads"] <= SCALARS[kernel], entry
            assert entry["other_stores"] <= 10, entry
        else:
            assert entry["wide_loads"] == entry["wide_stores"] == 0, entry
    assert {entry["aligned"] for entry in compiled(arch)} == {True, False}


@compiles
@NVIDIA
def test_nothing_spills_and_everything_fits(arch):
    for entry in compiled(arch):
        # Some assemblers put a scalar or two of the row aside, once a row.
        assert entry["spills"] == 0 and entry["stack"] <= 16, entry
        # A multiprocessor has 65,536 registers for the 512 threads that the launcher counts on.
        assert entry["registers"] <= 128, entry
        assert entry["shared"] <= 256, entry


# Issued per logit of so many bytes, reading it and writing it.
INSTRUCTIONS = {2: (7.0, 6.8), 4: (5.9, 5.3)}
# An H200: multiprocessors, and bytes per clock of its memory.
MULTIPROCESSORS, BYTES_PER_CLOCK = 132, 4.8e12 / 1.755e9


@compiles
@on("sm_90")
def test_sweeps_issue_few_instructions(arch):
    """At 4.8 TB/s an H200 has a tenth of its issue slots to spare, with an entropy term too."""
    for entry in compiled(arch):
        if entry["kernel"] != "fused" or not entry["aligned"] or not entry["writes"]:
            continue
        if entry["of"][0].split()[0] in ("tv", "kl"):
            continue
        (read, masked_read), (masked_write, write) = (
            entry["issued"]["read"],
            entry["issued"]["write"],
        )
        assert read < masked_read and write < masked_write
        traffic, issued = 2 * entry["size"], masked_read + masked_write
        assert issued < 0.9 * 128 * traffic * MULTIPROCESSORS / BYTES_PER_CLOCK, entry
        if entry["of"] in (["dynamic-clip", "bf16", 151936], ["dynamic-clip", "fp32", 151936]):
            read_limit, write_limit = INSTRUCTIONS[entry["size"]]
            assert 0.95 * read_limit < read <= read_limit, entry
            assert 0.95 * write_limit < write <= write_limit, entry


@pytest.mark.parametrize(
    ("size", "vocab", "threads"),
    [
        *((2, vocab, 256) for vocab in (16384, 32000, 50304, 65536)),  # two programs fit into L2
        *((2, vocab, 512) for vocab in (102400, 128256, 151936, 262144)),
        *((4, vocab, 256) for vocab in (8192, 32000)),
        *((4, vocab, 512) for vocab in (128256, 151936)),
        (2, 8192, 128),  # as small as holds the row
    ],
)
def test_threads_per_row_of_an_h200(size, vocab, threads):
    device = triton.Device(MULTIPROCESSORS, 32, 50 << 20)
    programs, (block, lanes), _ = triton.launch_shape("fused", vocab, size, True, 32, device)
    assert lanes == threads
    assert programs == MULTIPROCESSORS * 512 // threads
    assert block * size <= threads * 128


@compiles
@on("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
def test_no_float64(arch):
    for entry in compiled(arch):
        assert entry["float64"] == 0, entry


@compiles
@on("gfx942")
def test_nothing_keeps_an_amd_gpu_out(arch):
    for entry in compiled(arch):
        if entry["aligned"] and entry["writes"]:
            assert entry["wide_loads"] >= LOADS[entry["kernel"]] * entry["vectors"], entry


@compiles
@pytest.mark.parametrize("vocabs", [("33000", "72000"), ("80000", "320000")], ids="-".join)
def test_twenty_batches_compile_once(vocabs):
    """Whatever N, V, the lengths, the bounds and the temperature are, along a row of the launch
    table."""
    counts = json.loads(run_python("aot.py", "sm_90", "count", *vocabs))
    assert counts == {"fused": 1, "row_stats": 1, "row_gradient": 1, "multiply_": 1}
