"""Rows of every width and of any number, offsets past 2^31, and every value of a half precision."""

from __future__ import annotations

import math

import pytest
import torch
from backends import CPU, on_backends
from numerics import INF, assert_selected, exact, run
from problems import DTYPES, OBJECTIVES, ROUNDING, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.ops.records import Options

# Not in the emulator, to which rows like these are minutes; test_cuda_emulated has its own.
by_kernels = on_backends(*CPU, "triton interpreted")
everywhere = on_backends("reference", *CPU, "triton interpreted")
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One and two vectors of each width, blocks of four, the chunk of 2048, and what lies beside them.
VOCABS = [*range(1, 71), *range(126, 131), *range(2047, 2054), 4095, 4096, 4097, 4099]
# The smallest block of a Triton kernel and beside it, one and several of its tiles.
LONGER = [511, 512, 513, 1003, 8192, 8193, 32768, 32769, 40008, 81928]


# ---- widths -------------------------------------------------------------------------------------


def hard_rows(vocab: int) -> torch.Tensor:
    rows = torch.randn(9, vocab)
    rows[0] -= 60  # a tail that adds exp(0) to the sum shows
    rows[1], rows[1, -1] = -60.0, 0.0  # the peak in the last column
    rows[2] = torch.linspace(-30, 30, vocab)  # the maximum keeps rising
    rows[3] += 1e4
    rows[4, : vocab * 3 // 4] = -INF  # lanes and tiles without a logit
    rows[5, vocab // 4 + 1 :] = -INF
    rows[6, ::2] = -INF
    rows[6, -1] = 20.0
    rows[7] = -60.0
    rows[8, 0] = 50.0
    return rows


def targets(vocab: int) -> list[int]:
    """Of these rows, and none of them a logit of -inf."""
    return [0, vocab - 1, vocab // 2, vocab // 3, vocab - 1, 0, vocab - 1, vocab // 3, vocab - 1]


def one_dtype_interpreted(dtype: torch.dtype, use_backend: str) -> None:
    if use_backend == "triton" and dtype != torch.bfloat16:
        pytest.skip("in Triton's interpreter it takes a minute: with bfloat16 alone")


@by_kernels
@on_dtypes
def test_every_width(dtype, use_backend):
    one_dtype_interpreted(dtype, use_backend)
    for vocab in [*VOCABS, *LONGER]:
        rows, temperature = hard_rows(vocab).to(dtype), 0.7 if vocab in LONGER else 1.0
        assert_selected(rows, targets(vocab), use_backend, temperature, note=f"V={vocab}")


@by_kernels
@on_dtypes
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("vocab", [513, 8193, 32769, 40008, 81928])
def test_policy_loss_of_hard_rows(vocab, entropy_coef, dtype, use_backend):
    p = problem(dk.dcpo(entropy_coef=entropy_coef), dtype=dtype, lengths=(9,), vocab=16)
    p.base = hard_rows(vocab).to(dtype)
    p.arguments["target_ids"] = torch.tensor(targets(vocab))
    expected = p.oracle()
    for inplace in (False, True):
        assert_matches(p, p.run(backend=use_backend, inplace=inplace), expected)


@by_kernels
@on_dtypes
def test_every_width_writes_its_row_and_nothing_beside_it(dtype, use_backend):
    one_dtype_interpreted(dtype, use_backend)
    for vocab in VOCABS:
        padded = torch.full((3, vocab + 9), 5.0, dtype=dtype)
        padded[:, 4 : 4 + vocab] = torch.randn(3, vocab)
        logits = padded[:, 4 : 4 + vocab]
        ids = torch.tensor([0, vocab - 1, vocab // 2])
        expected = run(logits, ids, backend=use_backend)[1]
        beside = run(logits.contiguous(), ids, backend=use_backend)[1]
        if use_backend == "triton":  # rows on 16 bytes are added up in another order
            torch.testing.assert_close(beside, expected, rtol=2 * ROUNDING[dtype], atol=2e-7)
        else:
            assert torch.equal(beside, expected)
        stats = ops.row_stats(logits, ids, None, None, *Options(1.0, False), use_backend)
        assert torch.equal(stats[2], logits.float().amax(1)) or vocab > 2048
        made = padded.requires_grad_() * 1  # in place wants logits that are no leaf
        view = made[:, 4 : 4 + vocab]
        out = dk.policy_loss(
            view, ids, torch.full((3,), -1.0), torch.ones(3), lengths=[1] * 3,
            objective=dk.grpo(), inplace=True, backend=use_backend,
        )  # fmt: skip
        out.loss.backward()
        assert torch.equal(view, expected), f"V={vocab}"
        assert (made[:, :4] == 5).all() and (made[:, 4 + vocab :] == 5).all(), f"V={vocab}"


@everywhere
@on_dtypes
@pytest.mark.parametrize("order", ["ascending", "descending", "steps", "peak last"])
def test_a_maximum_that_keeps_rising(order, dtype, use_backend):
    """The sum so far is rescaled with each new maximum: 16 chunks of 2048, and 9 logits."""
    vocab = 16 * 2048 + 9
    rows = {
        "ascending": torch.linspace(-30, 30, vocab),
        "descending": torch.linspace(30, -30, vocab),
        "steps": torch.arange(vocab).div(2048, rounding_mode="floor") * 2.5,  # just below 2^4
        "peak last": torch.cat([torch.zeros(vocab - 1), torch.tensor([40.0])]),
    }[order]
    rows = rows.to(dtype).expand(3, vocab)
    assert_selected(rows, [0, vocab // 2, vocab - 1], use_backend, temperature=0.8)


# ---- numbers of rows and logits -----------------------------------------------------------------


@everywhere
@on_dtypes
def test_more_rows_than_a_grid_dimension_holds(dtype, use_backend):
    one_dtype_interpreted(dtype, use_backend)
    rows = 2**16 + 64
    logits = (2 * torch.randn(rows, 3)).to(dtype)
    ids = torch.randint(3, (rows,))
    want, want_entropy, log_p = exact(logits, ids)
    old, A = (want + 0.3 * torch.randn(rows)).float(), torch.randn(rows)
    options = {"lengths": [30_000, 0, rows - 30_000], "with_entropy": True, "backend": use_backend}
    read = torch.ones(rows, dtype=torch.bool)
    if use_backend == "triton":  # its interpreter takes 7 ms for a row that is read
        read[50:-50] = False
        A[~read] = 0.0
        options["skip_zero_advantage"] = True
    out, gradient = run(logits, ids, old, A, objective=dk.cispo(1.2, aggregation="token-sum"),
                        **options)  # fmt: skip
    want, want_entropy = (torch.where(read, x, 0.0) for x in (want, want_entropy))
    torch.testing.assert_close(out.logprobs.double(), want, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(out.entropy.double(), want_entropy, rtol=2e-6, atol=3e-6)
    g = -A.double() * (want - old).exp().clamp(max=1.2)
    expected = g[:, None] * (torch.nn.functional.one_hot(ids, 3) - log_p.exp())
    slack = ROUNDING[dtype] * expected.abs() + 1e-5 * g[:, None].abs() + 2**-24
    assert ((gradient.double() - expected).abs() <= slack).all()


@everywhere
@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl"])
def test_full_divergence_over_several_tiles(name, use_backend):
    p = problem(OBJECTIVES[name](), lengths=(4, 4), vocab=33001, drift=0.3)
    assert_matches(p, p.run(backend=use_backend), p.oracle())


@by_kernels
@on_dtypes
def test_a_very_long_row(dtype, use_backend):
    rows = (3 * torch.randn(1, 262_144)).to(dtype)
    assert_selected(rows, [262_143], use_backend)
    flat = torch.zeros(1, 262_144, dtype=dtype)
    assert_selected(flat, [0], use_backend)


# Rows further apart than 2^31 elements: the memory between them is reserved and never touched.
FAR = 2**31 + 4096
VOCAB = 100


class Made(torch.autograd.Function):
    """The same memory as if a model had just made it: in place wants logits that are no leaf."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@by_kernels
@pytest.mark.parametrize("padded", [False, True], ids=["row stride", "batch stride"])
def test_offsets_past_2_to_the_31(padded, use_backend):
    rows = torch.randn(3, VOCAB).bfloat16()
    memory = torch.empty(2 * FAR + VOCAB, dtype=torch.bfloat16)
    shape = (3, 1, VOCAB) if padded else (3, VOCAB)
    strides = (FAR, VOCAB, 1) if padded else (FAR, 1)
    logits = memory.as_strided(shape, strides)
    logits.copy_(rows.view(shape))
    ids, old, A = torch.tensor([3, 50, 99]), torch.full((3,), -4.0), torch.ones(3)
    grouping = {"mask": torch.ones(3, 1)} if padded else {"lengths": [1, 1, 1]}
    if padded:
        ids, old = ids[:, None], old[:, None]
    options = {"objective": dk.grpo(), "backend": use_backend, **grouping}

    leaf = rows.view(shape).clone().requires_grad_()
    want = dk.policy_loss(leaf, ids, old, A, **options)
    want.loss.backward()
    with torch.no_grad():
        out = dk.policy_loss(logits, ids, old, A, **options)
    assert torch.equal(out.logprobs, want.logprobs)
    made = Made.apply(logits.requires_grad_())
    dk.policy_loss(made, ids, old, A, inplace=True, **options).loss.backward()
    assert torch.equal(logits, leaf.grad)


@by_kernels
def test_more_than_2_to_the_31_logits(use_backend):
    """One row that counts, the last of 2^31 / V + 2; the others are not read and never touched."""
    vocab, time = 2**17, 2**14 + 2
    logits = torch.empty(1, time, vocab, dtype=torch.bfloat16)
    logits[0, -1] = torch.randn(vocab).bfloat16()
    mask = torch.zeros(1, time)
    mask[0, -1] = 1
    ids = torch.full((1, time), -100)
    ids[0, -1] = vocab - 1
    out = dk.policy_loss(
        logits, ids, torch.zeros(1, time), torch.ones(1), mask=mask, with_entropy=True,
        backend=use_backend,
    )  # fmt: skip
    want, want_entropy, _ = exact(logits[0, -1:], [vocab - 1])
    torch.testing.assert_close(out.logprobs[0, -1:].double(), want, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(out.entropy[0, -1:].double(), want_entropy, rtol=2e-6, atol=3e-6)
    assert (out.logprobs[0, :-1] == 0).all()


# ---- conversions --------------------------------------------------------------------------------

PATTERNS = torch.arange(65_536, dtype=torch.int32).to(torch.uint16)


def sample(values, backend):
    """All of them; in Triton's interpreter, some milliseconds a row, about a thousand."""
    return values[:: len(values) // 1000].clone() if backend == "triton" else values


halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@by_kernels
@halves
def test_every_half_is_read_as_it_is(dtype, use_backend):
    """row_max of a row of equal logits is that logit. 67: a block of every width, and a tail."""
    values = sample(PATTERNS.view(dtype), use_backend)
    number, finite = ~values.isnan(), values.isfinite()
    for vocab in (1, 67):
        logits = values[:, None].expand(-1, vocab).contiguous()
        ids = torch.full((len(values),), vocab - 1)
        options = Options(1.0, False)
        logprobs, _, row_max, _ = ops.row_stats(logits, ids, None, None, *options, use_backend)
        assert torch.equal(row_max[number], values[number].float())
        assert logprobs[~number].isnan().all()
        assert (logprobs[finite] + math.log(vocab)).abs().max() < 1e-6


def neighbours(dtype):
    """Every finite value of a half precision, the float32 halfway to the next, and those beside."""
    values = PATTERNS.view(dtype)
    values = values[values.isfinite()].float()
    bits = values.view(torch.int32)
    half_step = 1 << (15 if dtype == torch.bfloat16 else 12)
    around = [bits + d for d in (0, 1, half_step - 1, half_step, half_step + 1)]
    out = [x.view(torch.float32) for x in around] + [values * 0.75, values * 1.0001]
    if dtype == torch.float16:  # between the denormals the steps are equal
        ends = torch.arange(0, 1025).float() * 2**-24
        ties = ends + 2**-25
        edges = [ties, torch.nextafter(ties, ends), torch.nextafter(ties, ends + 1), ends]
        out += [sign * edge for edge in edges for sign in (1, -1)]
        top = [65503.0, 65504.0, 65519.0, 65519.996, 65520.0, 65536.0, 1e9, 3e38, 1e-30, 1e-45]
        out += [torch.tensor(top), -torch.tensor(top)]
    out = torch.cat(out)
    return out[out.isfinite()]


@by_kernels
@halves
def test_every_half_is_rounded_to_nearest_even(dtype, use_backend):
    """With p = 1 everywhere, which no softmax gives, the gradient is -g, and 0 at the target; in a
    row of -inf, which has p = 0, it is g at the target."""
    g = sample(neighbours(dtype), use_backend)
    zeros = torch.zeros(len(g))
    ones = torch.zeros(len(g), 67, dtype=dtype)
    arguments = (None, zeros, zeros, None, g, None, None, 1.0, 0.0, use_backend)
    gradient = ops.row_gradient(ones, torch.full((len(g),), 66), *arguments)
    wrong = (gradient[:, :-1] != (-g).to(dtype)[:, None]).any(1)
    assert not wrong.any(), f"{int(wrong.sum())} of {len(g)}, first {g[wrong][0]!r}"
    nothing = torch.full_like(ones[:, :1], -INF)
    target = ops.row_gradient(nothing, torch.zeros(len(g)).long(), *arguments)[:, 0]
    assert torch.equal(target, g.to(dtype))
