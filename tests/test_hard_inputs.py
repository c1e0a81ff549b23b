"""Inputs that hurt: -inf, NaN, ids that don't exist, rows far from 0, the ends of a format, old
probabilities of 0."""

from __future__ import annotations

import math

import pytest
import torch
from backends import CPU, GPU, ON_CPU, SLOW, on_backends
from numerics import INF, NAN, assert_selected, exact, run
from problems import DTYPES, OBJECTIVES, ROUNDING, assert_matches, problem

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.ops.records import Options, Results, Rows, Tokens

everywhere = on_backends(*ON_CPU)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- -inf ---------------------------------------------------------------------------------------


@everywhere
@on_dtypes
@pytest.mark.parametrize("lowest", ["-inf", "finfo.min"])
def test_masked_logits(lowest, dtype, use_backend):
    """Logits that a sampler or a grammar has taken out, also a whole chunk of them in front."""
    low = -INF if lowest == "-inf" else torch.finfo(dtype).min
    vocab = 2 * 2048 + 77
    rows = torch.randn(6, vocab)
    rows[0, ::2] = low
    rows[1, :2048] = low
    rows[2, :4096] = low
    rows[3, 2048:] = low
    rows[4] = low
    rows[4, 5] = -3.0  # one is left
    rows[5] = low
    rows[5, vocab - 1] = 700.0
    ids = [1, 2048, 4100, 7, 5, vocab - 1]
    assert_selected(rows.to(dtype), ids, use_backend)
    assert_selected(rows.to(dtype), ids, use_backend, temperature=0.5)


@everywhere
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_rows_with_minus_infinity(name, use_backend):
    for dtype in DTYPES:
        p = problem(OBJECTIVES[name](entropy_coef=0.1, kl_coef=0.1), dtype=dtype, vocab=67)
        sampled = torch.nn.functional.one_hot(p.arguments["target_ids"], 67).bool()
        taken_out = (torch.rand(p.base.shape) < 0.4) & ~sampled
        p.base = p.base.masked_fill(taken_out, -INF)
        if p.arguments["objective"].penalty_coef:  # else KL(q || p) and the loss are infinite
            if "old_logits" in p.arguments:
                p.arguments["old_logits"] = p.arguments["old_logits"].masked_fill(taken_out, -INF)
            if "topk_ids" in p.arguments:
                gone = taken_out.gather(1, p.arguments["topk_ids"])
                p.arguments["topk_logprobs"] = p.arguments["topk_logprobs"].masked_fill(gone, -INF)
        found = p.run(backend=use_backend)
        assert_matches(p, found, p.oracle())
        assert (found[1][taken_out] == 0).all()


@everywhere
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_target_of_probability_zero(name, use_backend):
    """The log-probability is -inf; loss and gradient are the oracle's, and finite but for a KL."""
    for dtype in DTYPES:
        objective = OBJECTIVES[name](entropy_coef=0.1, kl_coef=0.1)
        p = problem(objective, dtype=dtype, lengths=(1, 1, 2))
        p.arguments["advantages"] = torch.tensor([1.0, -1.0, 0.5, 0.0])
        p.base[[0, 1, 3], p.arguments["target_ids"][[0, 1, 3]]] = -INF
        out, gradient = p.run(backend=use_backend)
        want, want_gradient = p.oracle()
        assert (out.logprobs[[0, 1, 3]] == -INF).all() and out.logprobs[2].isfinite()
        # A penalty on KL(q || p) is infinite where p is 0 and q is not.
        finite = objective.penalty_coef == 0 or not objective.divergence.endswith("kl")
        assert out.token_loss.isfinite().all() or not finite
        torch.testing.assert_close(out.token_loss.double(), want.token_loss, rtol=1e-5, atol=1e-6)
        assert torch.equal(out.clipped, want.clipped)
        slack = ROUNDING[dtype] * want_gradient.abs() + 1e-6
        assert ((gradient.double() - want_gradient).abs() <= slack).all()


LOWS = [-INF, "finfo.min", -1e38, -1e33]


@everywhere
@pytest.mark.parametrize("where", ["both", "old", "new"])
@pytest.mark.parametrize("low", LOWS, ids=str)
@pytest.mark.parametrize("name", ["kl", "tv"])
def test_masked_logits_in_a_full_divergence(name, low, where, use_backend):
    """What a grammar took out of both policies adds nothing to KL(q || p), also where a chunk, a
    thread or a lane holds nothing else, and the first of them too."""
    vocab = 2 * 4096
    column = torch.arange(vocab)
    taken_out = torch.zeros(9, vocab, dtype=torch.bool)
    taken_out[0] = torch.rand(vocab) < 0.4
    taken_out[1, 0] = True
    taken_out[2, :4096] = taken_out[3, 4096:] = taken_out[4, :-100] = True
    taken_out[5] = column % 16 < 3  # whole lanes of a CPU's vectors
    taken_out[6] = column % 256 < 40  # whole threads of CUDA, one element in turn
    taken_out[7] = column // 8 % 256 < 40  # and of Triton, 16 bytes in turn
    taken_out[8] = column // 4 % 256 < 40
    for dtype, temperature in ((torch.float32, 0.5), (torch.bfloat16, 2.0), (torch.bfloat16, 1.0)):
        penalty = dk.dppo(name, 0.0, penalty_coef=1.0, aggregation="token-sum")
        for objective in (dk.dppo(name, 0.05, aggregation="token-sum"), penalty):
            p = problem(
                objective, dtype=dtype, vocab=vocab, lengths=(9,), temperature=temperature,
                drift=0.3 * temperature,
            )  # fmt: skip
            a = p.arguments
            a["target_ids"] = torch.full((9,), vocab - 7)
            a["target_ids"][3] = 7
            gone = taken_out.clone()
            gone[torch.arange(9), a["target_ids"]] = False
            fill = torch.finfo(dtype).min if low == "finfo.min" else low
            if where != "old":
                p.base = p.base.masked_fill(gone, fill)
            if where != "new":
                a["old_logits"] = a["old_logits"].masked_fill(gone, fill)
            old = torch.log_softmax(a["old_logits"].double() / temperature, -1)
            a["old_logprobs"] = old.gather(1, a["target_ids"][:, None])[:, 0].float()
            out, gradient = p.run(backend=use_backend)
            want, want_gradient = p.oracle()
            huge = want.token_loss > 1e20  # of p = 0 where q is not
            assert huge.all() == (where == "new" and name == "kl" and objective is penalty)
            assert (out.token_loss[huge] > 1e20).all()
            close = {"rtol": 2e-5, "atol": 2e-5}
            found = out.token_loss[~huge].double()
            torch.testing.assert_close(found, want.token_loss[~huge], **close)
            assert torch.equal(out.clipped, want.clipped)
            slack = ROUNDING[dtype] * want_gradient.abs() + 1e-5
            assert ((gradient.double() - want_gradient).abs() <= slack).all()


@everywhere
@pytest.mark.parametrize("k", [1, 20, 128])
@pytest.mark.parametrize("name", ["dppo-topk_tv", "dppo-topk_kl", "cispo-centered"])
def test_topk_with_and_without_the_sampled_token(name, k, use_backend):
    p = problem(OBJECTIVES[name](), vocab=300, lengths=(8,), drift=1.5)
    old = torch.log_softmax(p.base, 1)
    top = old.topk(k)
    listed = (top.indices == p.arguments["target_ids"][:, None]).any(1)
    assert k == 128 or not listed.all()
    p.arguments["target_ids"][:4] = top.indices[:4, -1]
    p.arguments |= {"topk_ids": top.indices, "topk_logprobs": top.values}
    assert_matches(p, p.run(backend=use_backend), p.oracle())


@everywhere
@pytest.mark.parametrize("scale", [8, 40])
@pytest.mark.parametrize("vocab", [20, 300])  # of which 20 are listed
def test_a_centre_of_rows_with_next_to_nothing_beside_the_list(vocab, scale, use_backend):
    """alpha divides by what float32 leaves of 1 - sum p: nothing in the gradient may be more than
    an advantage. A weight that is never small makes alpha as large as it gets."""
    objective = dk.reinforce(score_centering=True, aggregation="token-sum")
    p = problem(objective, vocab=vocab, lengths=(8,))
    top = torch.log_softmax(p.base, 1).topk(20)
    p.base = scale * p.base
    p.arguments |= {"topk_ids": top.indices, "topk_logprobs": top.values}
    out, gradient = p.run(backend=use_backend)
    _, want_gradient = p.oracle()
    assert out.token_loss.isfinite().all() and want_gradient.abs().max() > 0.1
    error = (gradient - want_gradient).abs() / p.arguments["advantages"].abs()[:, None]
    assert error.max() < (1e-5 if vocab == 20 else 0.1)


@on_backends(*SLOW, *GPU)
@pytest.mark.parametrize("vocab", [37, 1003, 32000])
@pytest.mark.parametrize("bad", ["vocab", -1, -100, 2**40])
def test_an_id_outside_the_vocabulary_makes_its_row_nan(bad, vocab, use_backend, unchecked_ids):
    bad = vocab if bad == "vocab" else bad
    own = torch.arange(5) == 1
    for name, argument in (("dppo-topk_tv", "topk_ids"), ("dcpo", "target_ids")):
        p = problem(OBJECTIVES[name](), lengths=(3, 2), vocab=vocab)
        _, clean_gradient = p.run(backend=use_backend)
        p.arguments[argument][1 if argument == "target_ids" else (1, 2)] = bad
        out, gradient = p.run(backend=use_backend)
        assert torch.equal(out.token_loss.isnan(), own)
        assert gradient[own].isnan().all()
        assert torch.equal(gradient[~own], clean_gradient[~own])
    logprobs, _, gradient = p.selected(lambda logprobs, _: logprobs.sum(), use_backend)
    assert torch.equal(logprobs.isnan(), own) and gradient[own].isnan().all()
    assert gradient[~own].isfinite().all()


# ---- NaN and +inf -------------------------------------------------------------------------------


def bits(number: int) -> torch.Tensor:
    """The float32 of these 32 bits."""
    return torch.tensor(number, dtype=torch.int64).to(torch.int32).view(torch.float32)


@everywhere
@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_what_is_no_temperature_makes_its_row_nan(value, use_backend):
    """On a GPU nobody looks at one per row beforehand."""
    p = problem(dk.dcpo(), lengths=(3, 2))
    a = p.arguments
    temperatures = torch.tensor([1.0, 0.7, value, 2.0, 1.0])
    rows = Rows(a["target_ids"], temperatures, None, None, None)
    tokens = Tokens(a["old_logprobs"], a["advantages"], torch.ones(5), None, None)
    options = Options(1.0, False)
    *results, _, gradient = ops.fused(
        p.base, *rows, *tokens, *dk.dcpo().numbers, *options, True, use_backend
    )
    results = Results(*results)
    bad = torch.arange(5) == 2
    assert results.token_loss[bad].isnan().all() and gradient[bad].isnan().all()
    assert results.token_loss[~bad].isfinite().all() and gradient[~bad].isfinite().all()


@everywhere
@pytest.mark.parametrize("what", ["old", "ref"])
@pytest.mark.parametrize("name", ["dcpo", "gspo", "cispo", "dppo-kl"])
def test_a_ratio_of_nothing_to_nothing(name, what, use_backend):
    """p = q = 0: 0/0 is that row's loss (gspo: its response's), and no other row's gradient."""
    p = problem(OBJECTIVES[name](kl_coef=0.1 * (what == "ref")), lengths=(3, 2, 4))
    row, ids = 3, p.arguments["target_ids"]
    p.base[row, ids[row]] = -INF
    p.arguments["old_logprobs" if what == "old" else "ref_logprobs"][row] = -INF
    out, gradient = p.run(backend=use_backend)
    own = torch.arange(9) == row
    if name == "gspo" and what == "old":
        own = torch.tensor([False] * 3 + [True] * 2 + [False] * 4)
    assert not out.token_loss[own].isfinite().any()
    assert out.token_loss[~own].isfinite().all() and gradient[~own].isfinite().all()
    assert not out.loss.isfinite()


@everywhere
@on_dtypes
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan", "inf"])
def test_a_poisoned_logit_stays_in_its_row(poison, dtype, use_backend):
    vocab = 2048 + 83
    clean = torch.randn(9, vocab).to(dtype)
    ids = torch.arange(9)
    options = {"objective": dk.dcpo(entropy_coef=0.1, aggregation="token-sum")}
    options |= {"with_entropy": True, "backend": use_backend}
    out, gradient = run(clean, ids, **options)
    # The target, both ends, both chunks, a whole vector, a whole row
    places = {1: slice(1, 2), 3: slice(0, 1), 4: slice(vocab - 1, vocab), 5: slice(2050, 2051)}
    places |= {6: slice(64, 128), 7: slice(0, vocab)}
    poisoned = clean.clone()
    for row, place in places.items():
        poisoned[row, place] = poison
    broken = torch.isin(torch.arange(9), torch.tensor(list(places)))
    out2, gradient2 = run(poisoned, ids, **options)
    for key in ("token_loss", "logprobs", "entropy", "ratio", "response_loss"):
        one, two = getattr(out, key), getattr(out2, key)
        assert two[broken].isnan().all(), key
        assert torch.equal(one[~broken], two[~broken]), key
    assert gradient2[broken].isnan().all()
    assert torch.equal(gradient[~broken], gradient2[~broken])
    assert out2.loss.isnan()


@everywhere
@on_dtypes
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["grpo", "dppo-kl", "penalty-tv", "penalty-topk_kl"])
def test_a_poisoned_row_is_nan_everywhere(name, poison, dtype, use_backend):
    """Where logits are -inf too: 2^-inf times NaN is 0 in AVX-512."""
    for parts in ({}, {"entropy_coef": 0.1}):
        p = problem(OBJECTIVES[name](**parts), dtype=dtype, lengths=(2, 1))
        p.base[1, ::2] = -INF
        p.base[1, 5] = poison
        out, gradient = p.run(backend=use_backend)
        assert out.token_loss[1].isnan() and gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()
    leaf = p.base.clone().requires_grad_()
    ids = p.arguments["target_ids"]
    logprobs, _ = dk.selected_logprobs(leaf, ids, backend=use_backend)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert logprobs[1].isnan() and gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@everywhere
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_poisoned_logit_reaches_its_loss_in_every_objective(name, use_backend):
    for dtype in DTYPES:
        p = problem(OBJECTIVES[name](kl_coef=0.1), dtype=dtype, lengths=(3, 2))
        clean = p.run(backend=use_backend)
        p.base[1, 5] = NAN
        out, gradient = p.run(backend=use_backend)
        # One ratio a response: all of its tokens
        one_ratio, rows = p.arguments["objective"].by_response, torch.arange(5)
        broken = rows < 3 if one_ratio else rows == 1
        assert out.token_loss[broken].isnan().all() and gradient[1].isnan().all()
        assert torch.equal(out.token_loss[~broken], clean[0].token_loss[~broken])
        assert torch.equal(gradient[~broken], clean[1][~broken])


@everywhere
@pytest.mark.parametrize("argument", ["old_logprobs", "advantages", "importance_weights"])
def test_a_nan_of_any_bits_in_another_argument(argument, use_backend):
    """0x7fffffff is what CUDA calls NaN: a rounding carry would make it -0 in bfloat16."""
    for dtype in DTYPES:
        p = problem(dk.grpo(), dtype=dtype, importance="token")
        out, _ = p.run(backend=use_backend)
        p.arguments["old_logprobs"] = out.logprobs.clone()  # nothing is clipped
        for pattern in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
            kept = p.arguments[argument].clone()
            p.arguments[argument][3] = bits(pattern)
            out, gradient = p.run(backend=use_backend)
            p.arguments[argument] = kept
            assert out.token_loss[3].isnan(), hex(pattern)
            assert gradient[3].isnan().all(), f"{dtype} {hex(pattern)}"
            assert gradient[[0, 1, 2, 4]].isfinite().all()


@everywhere
@pytest.mark.parametrize("inplace", [False, True])
def test_all_tokens_masked(inplace, use_backend):
    for name in OBJECTIVES:
        objective = OBJECTIVES[name](kl_coef=0.1, entropy_coef=0.1)
        p = problem(objective, layout="padded", lengths=(0, 0, 0))
        assert p.base.isnan().all()
        out, gradient = p.run(backend=use_backend, inplace=inplace)
        assert out.loss == 0 and (out.token_loss == 0).all() and (gradient == 0).all()
        assert (out.ratio == 1).all() and (out.response_loss == 0).all()


# ---- magnitudes ---------------------------------------------------------------------------------


@everywhere
@on_dtypes
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_rows_far_from_zero(shift, dtype, use_backend):
    rows = (torch.randn(6, 2100) + shift).to(dtype)
    assert_selected(rows, [0, 1, 2, 3, 4, 5], use_backend)
    p = problem(dk.dcpo(entropy_coef=0.1), dtype=dtype)
    p.base = (p.base + shift).to(dtype)
    assert_matches(p, p.run(backend=use_backend), p.oracle())


@everywhere
@on_dtypes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logits_of_any_size(temperature, dtype, use_backend):
    """Differences that overflow float32 once divided by the temperature."""
    most = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    rows = torch.randn(7, 2100)
    rows[0, :9] = torch.tensor([most, -most, 0, 1, -1, most / 2, -most / 2, tiny, -tiny])
    rows[1, :2048] = -most
    rows[2, :2048], rows[2, 2048:] = -most, most
    rows[3] = most
    rows[4] = -most
    rows[5] = tiny
    rows[6] *= 1e3
    rows = rows.to(dtype)
    ids = [0, 2050, 2060, 5, 6, 7, int(rows[6].argmax())]
    assert_selected(rows, ids, use_backend, temperature)


@on_backends(*CPU)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("peak", [17.0, 23.0, 30.0, 40.0])
def test_what_lies_beside_a_peak(peak, dtype, use_backend):
    """151,936 logits, one of them so far above the others that log p, the entropy and the target's
    1 - p are a sum of terms below float32's resolution at 1: each to a few of its last places."""
    vocab = 151_936
    places = [0, 7, 2047, 2048, vocab // 2, vocab - 1]
    rows = torch.randn(len(places) + 4, vocab).to(dtype)
    for row, place in enumerate(places):
        rows[row, place] = peak + 3
    rows[-4, [3, 90_000]] = peak + 3  # two of them
    rows[-3, 100:60_000:5_000] = torch.linspace(8, peak, 12).to(dtype)  # one after the other
    rows[-3, 70_001] = peak + 3
    rows[-2, :2048], rows[-2, 5000] = -INF, peak + 3
    rows[-1, 4], rows[-1, 100_000] = 1.5, peak + 3  # the peak is not the target
    ids = torch.tensor([*places, 3, 70_001, 5000, 4])
    d, top = rows.double(), rows.double().max(1)  # float64 has no digits left at 40 nats either
    d = d - top.values[:, None]
    e = d.exp()
    log_sum = e.scatter(1, top.indices[:, None], 0.0).sum(1).log1p()
    want = d.gather(1, ids[:, None])[:, 0] - log_sum
    want_entropy = log_sum - (e * d.nan_to_num(neginf=0.0)).sum(1) / e.sum(1)
    leaf = rows.clone().requires_grad_()
    logprobs, entropy = dk.selected_logprobs(leaf, ids, with_entropy=True, backend=use_backend)
    torch.testing.assert_close(logprobs.double(), want, rtol=5e-6, atol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=5e-6, atol=0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    expected = -torch.expm1(want)
    found = gradient.double().gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5 + ROUNDING[dtype], atol=0)
    gradient = run(rows, ids, old=want.float(), backend=use_backend)[1]  # ratio 1, g = -1
    found = gradient.double().gather(1, ids[:, None])[:, 0] * -len(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5 + ROUNDING[dtype], atol=0)


@everywhere
def test_float16_at_its_ends(use_backend):
    rows = torch.tensor(
        [
            [65504.0, 65504.0, -65504.0, 0.0, 2**-24, -(2**-24), 2**-14, -0.0],
            [2**-24, 2**-23, 3 * 2**-24, 2**-14 - 2**-24, 2**-14, 0.0, -(2**-24), -0.0],
        ]
    ).half()
    assert_selected(rows, [0, 3], use_backend)
    # Gradients that only denormal halves can hold, rounded to nearest
    logits = torch.zeros(1, 33).half()
    for size in (1e-3, 1e-4, 1e-5, 3e-6):
        gradient = run(logits, [0], old=[math.log(1 / 33)], A=[size], backend=use_backend)[1]
        expected = torch.full((1, 33), size / 33, dtype=torch.float64)
        expected[0, 0] = size / 33 - size
        assert ((gradient.double() - expected).abs() <= 2**-25 + expected.abs() * 2**-11).all()
        assert (gradient[0, 1] != 0) == (size / 33 > 2**-25)


OLD = [-80.0, -87.0, -87.4, -88.0, -95.0, -100.0, -103.0, -104.0, -110.0, -745.0, -1e30, -INF]


@everywhere
@pytest.mark.parametrize("name", ["dcpo", "inverse_sqrt", "grpo", "ppo", "cispo", "sapo"])
def test_old_probabilities_that_are_denormal_or_zero(name, use_backend):
    """q = exp(old) reaches 0 below -103.97; the bounds there are 1/2 and ratio_max (DCPO eq. 6)."""
    steps = [0.4, 0.55, 0.9, 1.1, 5.0, 9.5, 10.5]
    axes = (torch.tensor(OLD), torch.tensor(steps).log(), torch.tensor([1.0, -1.0]))
    old, logp, A = (column.flatten() for column in torch.meshgrid(*axes, indexing="ij"))
    target = torch.where(old > -1000, old + logp, -100.0)
    logits = torch.stack([target, torch.zeros_like(target)], 1)
    ids, objective = [0] * len(old), dk.dcpo() if name == "dcpo" else OBJECTIVES[name]()
    out, gradient = run(logits, ids, old, A, objective=objective, backend=use_backend)
    want = run(logits.double(), ids, old, A, objective=objective, backend="reference")
    want, want_gradient = want
    assert out.token_loss.isfinite().all() and gradient.isfinite().all()
    assert torch.equal(out.clipped, want.clipped)
    torch.testing.assert_close(out.token_loss.double(), want.token_loss, rtol=5e-5, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=5e-5, atol=1e-7)
    if name == "dcpo":
        low, high, cap = (out.clipped == code for code in (2, 1, 3))
        tiny = (old < -88) & (old > -1000)
        ratio = (target - old).exp()
        assert torch.equal(low & tiny, (ratio < 0.5) & (A < 0) & tiny)
        assert torch.equal(high & tiny, (ratio > 10) & (A > 0) & tiny)
        assert torch.equal(cap & tiny, (ratio > 10) & (A < 0) & tiny)
        assert (out.token_loss[low] == 0.5).all() and (out.token_loss[cap] == 10).all()
        assert (out.token_loss[high & tiny] == -10).all()


@on_backends(*SLOW)
@pytest.mark.parametrize("vocab", [1003, 8192, 151_936])
def test_what_stands_beside_a_peak(vocab, use_backend):
    """log p and the entropy of a peak, and 1 - p in its gradient, are the sum of all the others,
    which a float32 near 1 has no digits for. A thread adds up what it reads, the peak with it: its
    own share of that sum is lost, 1 / 32 of it where a row has one warp, else 1 / 128 at most."""
    peaks = [12.0, 17.0, 20.0, 30.0, 40.0, 60.0]
    at = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3, vocab - 9, 77])
    for dtype, temperature in ((torch.float32, 0.8), (torch.bfloat16, 1.0)):
        rows = torch.randn(len(peaks), vocab)
        rows[torch.arange(len(peaks)), at] = torch.tensor(peaks)
        rows = rows.to(dtype)
        leaf = rows.clone().requires_grad_()
        options = {"temperature": temperature, "with_entropy": True, "backend": use_backend}
        logprobs, entropy = dk.selected_logprobs(leaf, at, **options)
        (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
        z = rows.double() / temperature
        rest = (z - z.amax(1, keepdim=True)).exp()
        rest = rest.scatter(1, at[:, None], 0.0).sum(1)
        _, want_entropy, _ = exact(rows, at, temperature)
        want_entropy = torch.where(rest < 1e-9, entropy, want_entropy)  # float64 has no digits left
        found = gradient.gather(1, at[:, None])[:, 0].double() * temperature
        slack = 0.1 if vocab < 8000 else 0.02
        for name, value, want in (
            ("log p", logprobs.double(), -rest.log1p()),
            ("entropy", entropy.double(), want_entropy),
            ("1 - p", found, rest / (1 + rest)),
        ):
            off = (value / want - 1).abs()
            assert (off < slack).all(), f"{name} of {dtype} at T={temperature}: {off.tolist()}"
