"""What a batch may consist of: little or nothing, the same rows in another order, garbage where no
token counts."""

from __future__ import annotations

import pytest
import torch
from backends import CPU, KERNELS, on_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    DTYPES,
    OBJECTIVES,
    PER_TOKEN,
    assert_matches,
    assert_same_bits,
    fused_and_sequence,
    problem,
)

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.objective import AGGREGATIONS
from dcpo_kernels.ops.records import Options, Rows, Tokens

# ---- little or nothing --------------------------------------------------------------------------


@on_backends()
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@fused_and_sequence
def test_few_tokens(name, layout, lengths, use_backend):
    for aggregation in AGGREGATIONS:
        p = problem(OBJECTIVES[name](aggregation=aggregation), layout=layout, lengths=lengths)
        out, gradient = p.run(backend=use_backend, inplace=True, with_entropy=True)
        assert out.response_loss.shape == (len(lengths),)
        empty = torch.tensor(lengths, dtype=torch.int64) == 0
        assert (out.response_loss[empty] == 0).all()
        if sum(lengths):
            assert_matches(p, (out, gradient), p.oracle(with_entropy=True))
        else:
            assert out.loss == 0 and (gradient == 0).all()


@on_backends()
@pytest.mark.parametrize("lengths", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
@fused_and_sequence
def test_no_responses(name, lengths, use_backend):
    p = problem(OBJECTIVES[name](), lengths=())
    out, gradient = p.run(lengths=lengths, backend=use_backend)
    assert out.loss == 0 and out.token_loss.shape == (0,) and gradient.shape == (0, 37)


@on_backends()
@fused_and_sequence
def test_no_time(name, use_backend):
    leaf = torch.zeros(3, 0, 7, requires_grad=True)
    nothing = torch.zeros(3, 0)
    out = dk.policy_loss(
        leaf, nothing.long(), nothing, torch.ones(3), mask=nothing, objective=OBJECTIVES[name](),
        backend=use_backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and torch.equal(out.response_loss, torch.zeros(3))


@on_backends()
def test_a_vocabulary_of_one(use_backend):
    p = problem(dk.dcpo(entropy_coef=0.1), vocab=1)
    out, gradient = p.run(backend=use_backend)
    assert (out.logprobs == 0).all() and (out.entropy == 0).all() and (gradient == 0).all()


# ---- a row does not know what else is in the batch ----------------------------------------------

LONG = (0, 3, 30, 1, 26)  # 60 rows of 9001 logits are worth three threads


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@on_backends(*CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["dcpo", "dppo-kl"])
def test_a_row_is_the_same_bits_in_any_batch(name, dtype, use_backend, torch_threads):
    objective = OBJECTIVES[name](aggregation="token-sum", entropy_coef=0.01)
    p = problem(objective, vocab=9001, lengths=LONG, dtype=dtype)
    rows = {key: x for key, x in p.arguments.items() if torch.is_tensor(x) and len(x) == 60}

    def batch(index, threads):
        torch_threads(threads)
        leaf = p.base[index].requires_grad_()
        part = {key: x[index] for key, x in rows.items()}
        rest = {**p.arguments, **part, "lengths": [1] * len(index)}
        out = dk.policy_loss(leaf, **rest, backend=use_backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return [getattr(out, key) for key in PER_TOKEN] + [gradient]

    whole = batch(torch.arange(60), 1)
    order = torch.randperm(60)
    for threads in (2, 3, 7):
        for index in (order, order[:7], order[:1]):
            for found, expected in zip(batch(index, threads), whole, strict=True):
                assert torch.equal(found, expected[index])


@on_backends(*KERNELS)
@pytest.mark.parametrize("vocab", [40, 37, 40008])
def test_a_row_alone_has_the_same_bits(vocab, use_backend):
    p = problem(dk.dcpo(entropy_coef=0.1), vocab=vocab, lengths=(5,), dtype=torch.bfloat16)
    a = p.arguments
    rows = Rows(a["target_ids"], None, None, None, None)
    tokens = Tokens(a["old_logprobs"], a["advantages"], torch.ones(5), None, None)
    rest = (*rows, *tokens, *a["objective"].numbers, *Options(1.0, True), True, use_backend)
    together = ops.fused(p.base, *rest)
    part = (x[3:4] if isinstance(x, torch.Tensor) else x for x in rest)
    alone = ops.fused(p.base[3:4], *part)
    assert all(torch.equal(x[3:4], y) for x, y in zip(together, alone, strict=True))


PROPERTIES = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def told_apart(lengths):
    """As many responses as tokens: with one more, [N] and [R] differ."""
    return (*lengths, 0) if sum(lengths) == len(lengths) else tuple(lengths)


batches = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 5), min_size=1, max_size=5).map(told_apart),
        "vocab": st.integers(2, 80),
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 999),
    }
)
objectives = st.builds(
    lambda name, aggregation, kl, entropy: OBJECTIVES[name](
        aggregation=aggregation, kl_coef=kl, entropy_coef=entropy
    ),
    st.sampled_from(list(OBJECTIVES)),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.1]),
)


@on_backends()
@PROPERTIES
@given(objective=objectives, batch=batches, data=st.data())
def test_permuted_responses_give_permuted_results(objective, batch, data, use_backend):
    p = problem(objective, layout="padded", **batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch["lengths"])))))
    out, gradient = p.run(backend=use_backend, with_entropy=True)
    moved = {key: x[order] for key, x in p.arguments.items() if torch.is_tensor(x)}
    p.base = p.base[order]
    out2, gradient2 = p.run(backend=use_backend, with_entropy=True, **moved)
    # torch's own exp may differ in the last bit from place to place
    close = {"rtol": 1e-6, "atol": 1e-6} if use_backend == "reference" else {"rtol": 0, "atol": 0}
    for key in (*PER_TOKEN, "response_loss", "mask"):
        torch.testing.assert_close(getattr(out2, key), getattr(out, key)[order], **close)
    torch.testing.assert_close(gradient2, gradient[order], **close)
    torch.testing.assert_close(out2.loss, out.loss, rtol=1e-5, atol=1e-5)


@on_backends()
@PROPERTIES
@given(objective=objectives, batch=batches, data=st.data())
def test_a_shifted_row_is_the_same_row(objective, batch, data, use_backend):
    p = problem(objective, **{**batch, "dtype": torch.float32})
    # Whole numbers on a grid of 1/64: adding them rounds nothing.
    p.base = (64 * p.base).round() / 64
    rows = len(p.base)
    shift = torch.tensor(
        data.draw(st.lists(st.integers(-10_000, 10_000), min_size=rows, max_size=rows))
    )
    expected = p.run(backend=use_backend)
    p.base = p.base + shift[:, None].float()
    assert_same_bits(p.run(backend=use_backend), expected)


@on_backends()
@PROPERTIES
@given(objective=objectives, batch=batches, garbage=st.sampled_from([torch.nan, torch.inf, -1e30]))
def test_tokens_that_do_not_count_have_no_influence(objective, batch, garbage, use_backend):
    p = problem(objective, layout="padded", importance="token", **batch)
    out, gradient = p.run(backend=use_backend, with_entropy=True)
    assert all(x.isfinite().all() for x in (*out, gradient))

    def garbage_of(dtype):
        if not dtype.is_floating_point:
            return 2**40
        return garbage if garbage != -1e30 else max(garbage, torch.finfo(dtype).min)

    p.base = torch.where(p.counts[..., None], p.base, garbage_of(p.base.dtype))
    other = {
        key: x.masked_fill(
            ~p.counts.view(*p.counts.shape, *[1] * (x.dim() - 2)), garbage_of(x.dtype)
        )
        for key, x in p.arguments.items()
        if torch.is_tensor(x) and x.shape[:2] == p.counts.shape and key != "mask"
    }
    assert_same_bits(p.run(backend=use_backend, with_entropy=True, **other), (out, gradient))
