"""On a GPU: both backends against float64, CUDA graphs, streams, errors that must not happen."""

from __future__ import annotations

import pytest
import test_golden
import test_ops
import torch
from problems import DTYPES, LAYOUTS, OBJECTIVES, Problem, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels import backends, ops
from dcpo_kernels.backends import cuda
from dcpo_kernels.backends.launch import launched
from dcpo_kernels.ops.records import Options, Rows, Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = backends.unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    return request.param


def on_gpu(p: Problem) -> Problem:
    arguments = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in p.arguments.items()
    }
    return Problem(p.base.cuda(), p.view, arguments)


def check(p: Problem, backend: str, **options) -> None:
    out, gradient = on_gpu(p).run(backend=backend, **options)
    on_cpu = (x if x is None else x.cpu() for x in out)
    assert_matches(p, (dk.PolicyLoss(*on_cpu), gradient.cpu()), p.oracle())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_and_layouts(name, layout, dtype, backend):
    p = problem(OBJECTIVES[name](), layout=layout, dtype=dtype, vocab=1003, temperature=0.8)
    check(p, backend)
    if layout != "row-stride":
        check(p, backend, inplace=True)


@test_golden.token_groups
def test_golden_tokens(cases, backend):
    with torch.device("cuda"):
        test_golden.test_tokens_through_the_kernels(cases, backend)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@test_golden.batches
def test_golden_batches(entry, dtype, layout, backend):
    with torch.device("cuda"):
        test_golden.test_batch_on_kernels(entry, dtype, layout, backend)


# Real vocabularies, odd ones, and rows for each way to run: streaming, clusters of 1, 2, 4, 8.
@pytest.mark.parametrize("vocab", [8192, 32000, 50257, 128256, 151936, 151937])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_vocabularies(vocab, dtype, inplace, backend):
    objective = dk.dcpo(kl_coef=0.02, entropy_coef=0.01)
    check(problem(objective, dtype=dtype, vocab=vocab), backend, inplace=inplace)


@pytest.fixture
def blocks(request):
    """How many blocks of the CUDA backend hold a row."""
    if reason := backends.unavailable("cuda", "cuda"):
        pytest.skip(reason)
    with launched(cluster=request.param):
        yield


@pytest.mark.parametrize("blocks", [0, 1, 2, 4, 8], indirect=True)
@pytest.mark.parametrize("vocab", [16896, 33280, 66560, 131088])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_cluster_sizes(vocab, blocks, dtype, inplace):
    check(problem(dk.dcpo(entropy_coef=0.01), dtype=dtype, vocab=vocab), "cuda", inplace=inplace)


# Watched by scripts/sanitize.sh: every kernel, every cluster size, padding, rows that end oddly.
@pytest.mark.parametrize(
    ("vocab", "blocks"),
    [(1003, 0), (33288, 0), (33288, 1), (33288, 2), (70008, 4), (70008, 8)],
    indirect=["blocks"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])  # one pass, two passes
def test_odd_rows(vocab, blocks, dtype, name):
    objective = OBJECTIVES[name](entropy_coef=0.01)
    p = problem(objective, layout="padded", dtype=dtype, vocab=vocab, lengths=(2, 0, 3))
    check(p, "cuda")
    if name == "dcpo":
        check(p, "cuda", inplace=True)
        _, gradient = on_gpu(p).run(backend="cuda")
        _, doubled = on_gpu(p).run(backend="cuda", upstream=lambda loss: 2 * loss)
        torch.testing.assert_close(doubled, 2 * gradient)


def rows(count: int, vocab: int) -> tuple[torch.Tensor, list]:
    """Logits, and what the operators take beside them up to `with_gradient`."""
    draw = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(count, vocab, device="cuda", generator=draw).bfloat16()
    ids = torch.randint(0, vocab, (count,), device="cuda", generator=draw)
    old, advantages = torch.randn(2, count, device="cuda", generator=draw)
    weights = torch.full((count,), 1 / count, device="cuda")
    tokens = Tokens(old - 10, advantages, weights, None, None)
    return logits, [*Rows(ids, *[None] * 4), *tokens, *dk.dcpo().numbers, *Options(1.0, True)]


def each(f, values) -> list:
    """f of the tensors among them."""
    return [f(x) if isinstance(x, torch.Tensor) else x for x in values]


@pytest.mark.parametrize("vocab", [1003, 32000, 151936])
def test_same_bits_in_any_batch_stream_and_run(vocab, backend):
    logits, rest = rows(200, vocab)
    wanted = ops.fused(logits, *rest, True, backend)
    part = each(lambda x: x[50:90], rest)
    queue = torch.cuda.Stream()
    queue.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(queue):
            again = ops.fused(logits, *rest, True, backend)
            some = ops.fused(logits[50:90], *part, True, backend)
        beside = ops.fused(logits, *rest, True, backend)
        torch.cuda.synchronize()
        assert all(map(torch.equal, wanted, again)) and all(map(torch.equal, wanted, beside))
        assert all(torch.equal(x[50:90], y) for x, y in zip(wanted, some, strict=True))


@pytest.mark.parametrize("vocab", [1003, 32000, 151936])
def test_captured_in_a_graph(vocab, backend):
    logits, rest = rows(100, vocab)
    ops.fused(logits, *rest, True, backend)  # Triton compiles at the first use
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        static = ops.fused(logits, *rest, True, backend)
    for _ in range(3):
        logits.mul_(-0.9)
        captured.replay()
        assert all(map(torch.equal, static, ops.fused(logits, *rest, True, backend)))


def test_no_sync(backend):
    logits, rest = rows(64, 32000)
    ops.fused(logits, *rest, True, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, gradient = ops.fused(logits, *rest, True, backend)
        ops.multiply_(gradient, torch.ones((), device="cuda"), backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grouping", ["lengths", "lengths on the CPU", "mask"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "dppo-topk_tv", "dppo-kl"])
def test_no_sync_in_a_training_step(name, grouping, backend):
    layout = "padded" if grouping == "mask" else "packed"
    p = on_gpu(problem(OBJECTIVES[name](), layout=layout, vocab=1003))
    if grouping == "lengths on the CPU":
        p.arguments["lengths"] = p.arguments["lengths"].tolist()
    p.run(backend=backend)
    leaf = p.base.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dk.policy_loss(p.view(leaf), **p.arguments, backend=backend).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", test_ops.LAYOUTS)
@pytest.mark.parametrize("op", ops.__all__)
def test_opcheck(op, layout, backend):
    def moved(x):
        if isinstance(x, list):
            return each(moved, x)
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

    *arguments, _ = test_ops.arguments_of(op, layout, torch.bfloat16, "reference")
    torch.library.opcheck(getattr(ops, op), (*map(moved, arguments), backend))


@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_compiled_into_cuda_graphs(name, backend):
    p = on_gpu(problem(OBJECTIVES[name](), dtype=torch.bfloat16, vocab=1003))

    def loss(base):
        return dk.policy_loss(p.view(base), **p.arguments, backend=backend).loss

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for scale in (1.0, 0.5, -0.9, 1.2):
        leaves = [(scale * p.base).requires_grad_() for _ in range(2)]
        losses = [f(leaf) for f, leaf in zip((loss, compiled), leaves, strict=True)]
        for value in losses:
            value.backward()
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("vocab", [1003, 32000])
def test_an_id_out_of_range_makes_its_row_nan(vocab, backend):
    logits, (ids, *rest) = rows(64, vocab)
    ids[[3, 9]] = torch.tensor([vocab, -1], device="cuda")
    token_loss, *_, gradient = ops.fused(logits, ids, *rest, True, backend)
    bad = torch.zeros(64, dtype=torch.bool, device="cuda")
    bad[[3, 9]] = True
    assert torch.equal(token_loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad) and gradient[~bad].isfinite().all()


def test_more_than_2_to_the_31_logits(backend):
    vocab, count = 32000, 70_000  # 4.5 GB; also more rows than a grid's second axis has
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    logits, rest = rows(1000, vocab)
    wanted = ops.fused(logits, *rest, True, backend)
    many = logits.repeat(count // 1000, 1)
    repeated = each(lambda x: x.repeat(count // 1000), rest)
    found = ops.fused_(many, *repeated, backend)
    for x, y in zip(wanted, found, strict=False):
        assert torch.equal(x.repeat(count // 1000), y)
    assert torch.equal(many[-1000:], wanted[-1])


def test_a_cuda_error_is_an_exception():
    if reason := backends.unavailable("cuda", "cuda"):
        pytest.skip(reason)
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cuda.C.cuda_multiply(
            rows=1, vocab=4, dtype=2, x=(x.data_ptr(), 1, 0, 0), factor=x.data_ptr(),
            device=1000, stream=0,
        )  # fmt: skip
    assert (x * 2 == 2).all()  # and the context is as it was
