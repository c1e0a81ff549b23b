"""What a GPU alone can say: real vocabularies, cluster sizes, CUDA graphs, streams, errors that
must not happen. What any device can is in the tests of every backend, where it runs too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import GPU, use
from problems import DTYPES, OBJECTIVES, Problem, assert_matches, moved, problem

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.backends import cuda
from dcpo_kernels.ops.records import Options, Rows, Tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(params=GPU)
def backend(request):
    with use(request.param) as name:
        yield name


def check(p: Problem, backend: str, **options) -> None:
    assert_matches(p, p.run(backend=backend, **options), p.oracle())


# Real vocabularies, odd ones, and rows for each way to run: streaming, clusters of 1, 2, 4, 8.
@pytest.mark.parametrize("vocab", [8192, 32000, 50257, 128256, 151936, 151937])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_vocabularies(vocab, dtype, inplace, backend):
    objective = dk.dcpo(kl_coef=0.02, entropy_coef=0.01)
    check(problem(objective, dtype=dtype, vocab=vocab), backend, inplace=inplace)


@pytest.fixture
def blocks(request, monkeypatch):
    """How many blocks of the CUDA backend hold a row."""
    with use("cuda"):
        monkeypatch.setattr(cuda, "fused", partial(cuda.fused, cluster=request.param))
        yield


every_size = pytest.mark.parametrize("blocks", [0, 1, 2, 4, 8], indirect=True)


@every_size
@pytest.mark.parametrize("vocab", [16896, 33280, 66560, 131088])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_cluster_sizes(vocab, blocks, dtype, inplace, poisoned):
    check(problem(dk.dcpo(entropy_coef=0.01), dtype=dtype, vocab=vocab), "cuda", inplace=inplace)


@every_size
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
def test_many_rows_to_a_multiprocessor(blocks, inplace, poisoned):
    """A block's shared memory is another's, of a row before."""
    rows = 24 * torch.cuda.get_device_properties(0).multi_processor_count
    p = problem(dk.dcpo(), dtype=torch.bfloat16, vocab=4104, lengths=(rows, 5, 8))
    check(p, "cuda", inplace=inplace)


# Watched by scripts/sanitize.sh: every kernel, every cluster size, padding, rows that end oddly.
@pytest.mark.parametrize(
    ("vocab", "blocks"),
    [(1003, 0), (33288, 0), (33288, 1), (33288, 2), (70008, 4), (70008, 8)],
    indirect=["blocks"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])  # one pass, two passes
def test_odd_rows(vocab, blocks, dtype, name, poisoned):
    objective = OBJECTIVES[name](entropy_coef=0.01)
    p = problem(objective, layout="padded", dtype=dtype, vocab=vocab, lengths=(2, 0, 3))
    check(p, "cuda")
    if name == "dcpo":
        check(p, "cuda", inplace=True)
        _, gradient = p.run(backend="cuda")
        _, doubled = p.run(backend="cuda", upstream=lambda loss: 2 * loss)
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
    p = problem(OBJECTIVES[name](), layout=layout, vocab=1003)
    p = Problem(p.base.cuda(), p.view, moved(p.arguments, "cuda"))
    if grouping == "lengths on the CPU":
        p.arguments["lengths"] = p.arguments["lengths"].tolist()
    p.run(backend=backend)
    leaf = p.base.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dk.policy_loss(p.view(leaf), **p.arguments, backend=backend).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_compiled_into_cuda_graphs(name, backend):
    p = problem(OBJECTIVES[name](), dtype=torch.bfloat16, vocab=1003)
    base, arguments = p.base.cuda(), moved(p.arguments, "cuda")

    def loss(base):
        return dk.policy_loss(p.view(base), **arguments, backend=backend).loss

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for scale in (1.0, 0.5, -0.9, 1.2):
        leaves = [(scale * base).requires_grad_() for _ in range(2)]
        losses = [f(leaf) for f, leaf in zip((loss, compiled), leaves, strict=True)]
        for value in losses:
            value.backward()
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


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
    with use("cuda"):
        x = torch.ones(4, device="cuda")
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            cuda.C.cuda_multiply(
                rows=1, vocab=4, dtype=2, x=(x.data_ptr(), 1, 0, 0), factor=x.data_ptr(),
                device=1000, stream=0,
            )  # fmt: skip
        assert (x * 2 == 2).all()  # and the context is as it was
