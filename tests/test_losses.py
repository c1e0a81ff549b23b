"""policy_loss on every backend, against float64 autograd of the reference."""

from __future__ import annotations

import functools
import itertools
from functools import partial

import pytest
import torch
from backends import CPU, EVERYWHERE, on_backends
from problems import (
    CODES,
    DTYPES,
    LAYOUTS,
    OBJECTIVES,
    PER_TOKEN,
    ROUNDING,
    assert_matches,
    assert_same_bits,
    fused_and_sequence,
    label,
    pairs,
    per_token,
    problem,
)

import dcpo_kernels as dk
from dcpo_kernels.objective import AGGREGATIONS

# Every two values of two of these meet; a value that stands here twice is in more of the cases.
SETTINGS = pairs(
    objective=tuple(OBJECTIVES),
    aggregation=AGGREGATIONS,
    layout=LAYOUTS,
    dtype=DTYPES,
    vocab=(24, 37, 2056),  # rows on 16 bytes, anywhere, and of several vectors
    temperature=(1.0, 0.7, 2.5, "token", "response"),
    kl_coef=(0.0, 0.05),
    entropy_coef=(0.0, 0.01),
    importance=(None, "token", "response"),
    advantages=("token", "response"),
    on_policy=(False, False, False, True),
    with_entropy=(False, True),
)
on_objectives = pytest.mark.parametrize("name", OBJECTIVES)
COEFFICIENTS = ("kl_coef", "entropy_coef")


@functools.cache
def solved(number):
    """The problem of a setting and what the oracle says of it."""
    case = dict(SETTINGS[number])
    with_entropy = case.pop("with_entropy")
    coefficients = {key: case.pop(key) for key in ("aggregation", *COEFFICIENTS)}
    p = problem(OBJECTIVES[case.pop("objective")](**coefficients), **case)
    return p, with_entropy, p.oracle(with_entropy=with_entropy)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=map(label, SETTINGS))
def test_values_and_gradient(number, use_backend):
    p, with_entropy, expected = solved(number)
    out, gradient = p.run(backend=use_backend, with_entropy=with_entropy)
    assert_matches(p, (out, gradient), expected)
    inplace = p.run(backend=use_backend, with_entropy=with_entropy, inplace=True)
    assert_same_bits(inplace, (out, gradient))

    assert gradient.dtype == p.base.dtype
    assert out.loss.shape == () and out.loss.requires_grad
    for key in out._fields[1:]:
        value = getattr(out, key)
        assert value is None or not value.requires_grad, key
    nothing = {"token_loss": 0, "logprobs": 0, "entropy": 0, "ratio": 1, "clipped": 0}
    for key in PER_TOKEN:
        value = getattr(out, key)
        if value is not None:
            assert value.shape == p.arguments["target_ids"].shape
            assert value.dtype == (torch.int8 if key == "clipped" else torch.float32)
            assert (value[~p.counts] == nothing[key]).all(), key
    assert (gradient[~p.counts] == 0).all()
    in_ratio = SETTINGS[number]["objective"] == "vespo"  # its importance weights are
    if p.arguments["old_logprobs"] is None and not in_ratio:
        assert (out.ratio == 1).all()


def test_settings_meet_in_pairs():
    for objective in OBJECTIVES:
        met = [case for case in SETTINGS if case["objective"] == objective]
        counts = {"aggregation": len(AGGREGATIONS), "layout": 5, "dtype": 3, "temperature": 5}
        for key, count in counts.items():
            assert len({case[key] for case in met}) == count


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("old_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl", "penalty-tv", "penalty-kl"])
def test_old_logits_of_another_dtype(name, old_dtype, use_backend):
    """They come from another engine."""
    options = {"layout": "sliced", "dtype": torch.bfloat16, "vocab": 67, "old_dtype": old_dtype}
    p = problem(OBJECTIVES[name](), **options)
    assert_matches(p, p.run(backend=use_backend), p.oracle())


@on_backends()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_ratio_on_the_log_prob_and_the_ratio_itself_have_one_gradient(
    dtype, use_backend
):
    """-A stop(r) log p and -A r, where no bound and no cap binds."""
    unbounded = dk.Objective("ratio", eps_low=1.0, eps_high=float("inf"))
    p = problem(unbounded, layout="padded", dtype=dtype)
    _, gradient = p.run(backend=use_backend)
    constant = dk.Objective("constant ratio", surrogate="reinforce")
    out, gradient2 = p.run(backend=use_backend, objective=constant)
    assert (out.clipped == 0).all() and gradient.abs().max() > 0
    rtol = 1e-5 + 2 * ROUNDING[dtype]
    torch.testing.assert_close(gradient, gradient2, rtol=rtol, atol=1e-7)


@on_objectives
def test_problems_reach_every_branch(name):
    out, _ = problem(OBJECTIVES[name]()).oracle()
    assert set(out.clipped.tolist()) == CODES[name]


# ---- the upstream gradient ----------------------------------------------------------------------

UPSTREAM = {
    "0.37": (lambda loss: loss * 0.37, 0.37),
    "-2": (lambda loss: -2 * loss, -2.0),
    "0": (lambda loss: 0 * loss, 0.0),
    "expanded": (lambda loss: loss.expand(5).sum(), 5.0),  # its gradient has stride 0
    "mean of stacked": (lambda loss: torch.stack([loss, loss.detach(), loss]).mean(), 2 / 3),
    "float64": (lambda loss: loss.double() / 3, 1 / 3),
}


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize(
    "case",
    pairs(
        upstream=tuple(UPSTREAM),
        name=("dcpo", "gspo"),
        dtype=DTYPES,
        layout=LAYOUTS,
        inplace=(False, True),
        vocab=(37, 40),
    ),
    ids=label,
)
def test_upstream_gradient(case, use_backend):
    upstream, name, dtype, layout, inplace, vocab = case.values()
    upstream, scale = UPSTREAM[upstream]
    p = problem(OBJECTIVES[name](entropy_coef=0.01), layout=layout, dtype=dtype, vocab=vocab)
    found = p.run(upstream, backend=use_backend, inplace=inplace)
    assert_matches(p, found, p.oracle(), scale)


@on_backends()
@fused_and_sequence
def test_several_losses_of_the_same_logits(name, use_backend):
    p = problem(OBJECTIVES[name]())
    leaf = p.base.clone().requires_grad_()
    other = {**p.arguments, "objective": dk.grpo(), "temperature": 0.7}
    first = dk.policy_loss(leaf, **p.arguments, backend=use_backend)
    second = dk.policy_loss(leaf, **other, backend=use_backend)
    (first.loss + 0.5 * second.loss).backward()
    expected = p.oracle()[1] + 0.5 * p.oracle(objective=dk.grpo(), temperature=0.7)[1]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=2e-6)


# ---- the same thing said in another way ---------------------------------------------------------


def assert_same(p, changes, use_backend, equal=True):
    out, gradient = p.run(backend=use_backend)
    out2, gradient2 = p.run(backend=use_backend, **changes)
    assert torch.equal(gradient, gradient2) == equal
    assert torch.equal(out.loss, out2.loss) == equal


@on_backends()
@pytest.mark.parametrize("lengths", [(6, 0, 1, 9, 8), (9,)], ids=len)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@fused_and_sequence
def test_other_types_of_the_same_arguments(name, layout, lengths, use_backend):
    """[1] per response, spread over its tokens, has a stride of 0, which no kernel may see."""
    options = {"advantages": "response", "importance": "response", "temperature": 0.7}
    p = problem(OBJECTIVES[name](kl_coef=0.1), layout=layout, lengths=lengths, **options)
    assert_matches(p, p.run(backend=use_backend), p.oracle())
    a = p.arguments
    same = partial(assert_same, p, use_backend=use_backend)
    for key in ("advantages", "importance_weights"):
        same({key: per_token(a[key], a)})
        same({key: per_token(a[key], a).clone()})
    same({"target_ids": a["target_ids"].int()})
    same({key: a[key].double() for key in ("old_logprobs", "ref_logprobs", "advantages")})
    same({"old_logprobs": a["old_logprobs"].clone().requires_grad_()})  # taken as a constant
    same({"advantages": -a["advantages"]}, equal=False)
    strided = torch.stack([a["old_logprobs"]] * 2, -1)[..., 0]
    assert not strided.is_contiguous()
    same({"old_logprobs": strided})
    if layout == "packed":
        lengths = a["lengths"]
        for other in (lengths.tolist(), tuple(lengths.tolist()), lengths.int(), lengths.numpy()):
            same({"lengths": other})
    else:
        mask = a["mask"]
        for other in (mask.float(), mask.int() * 3, mask.bfloat16(), mask.to(torch.uint8)):
            same({"mask": other})


@on_backends("reference", *CPU[:1])
def test_as_many_responses_as_tokens(use_backend):
    """[N] and [R] can't be told apart there; [R, 1] can."""
    p = problem(dk.grpo(), lengths=(2, 0, 1), advantages="response", drift=0.0)
    values = torch.tensor([1.0, 2.0, 3.0])
    p.arguments["advantages"] = values[:, None]
    for name in ("advantages", "importance_weights", "temperature"):
        with pytest.raises(ValueError, match=rf"{name} of shape \[3\] could .* pass \[3, 1\]"):
            p.run(backend=use_backend, **{name: values})
    out, _ = p.run(backend=use_backend)
    assert (-out.token_loss).tolist() == pytest.approx([1.0, 1.0, 3.0], rel=1e-5)
    p.arguments |= {"lengths": [1, 1, 1], "advantages": values}  # both readings are one
    out, _ = p.run(backend=use_backend)
    assert (-out.token_loss).tolist() == pytest.approx([1.0, 2.0, 3.0], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", ["token", "response"])
@on_objectives
def test_a_temperature_for_each(name, per, layout):
    """Rows of temperature T are rows of logits over T at temperature 1."""
    p = problem(OBJECTIVES[name](entropy_coef=0.01), layout=layout, temperature=per)
    a = p.arguments
    want, want_gradient = p.oracle(with_entropy=True)
    temperature = per_token(a["temperature"], a) if per == "response" else a["temperature"]
    temperature = temperature.double()[..., None]
    divided = {"temperature": 1.0}
    if "old_logits" in a:
        divided["old_logits"] = a["old_logits"] / temperature
    leaf = p.logits.double().requires_grad_()
    arguments = {**a, **divided, "with_entropy": True, "backend": "reference"}
    one = dk.policy_loss(leaf / temperature, **arguments)
    (gradient,) = torch.autograd.grad(one.loss, leaf)
    torch.testing.assert_close(want.token_loss, one.token_loss, rtol=1e-6, atol=1e-7)
    gradient, want_gradient = gradient.nan_to_num(), want_gradient.nan_to_num()
    torch.testing.assert_close(want_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, objective in OBJECTIVES.items()
        if objective().divergence == "none" and objective().old_kl_estimator != "abs"
    ],
)
def test_on_policy(name, layout):
    """old_logprobs=None: as with log-probabilities taken from these logits just before. (To a
    divergence and to |log r|, a log-ratio of 1e-8 is one that moves.)"""
    options = {"layout": layout, "importance": "token", "on_policy": True}
    p = problem(OBJECTIVES[name](kl_coef=0.05), **options)
    out, gradient = p.oracle()
    _, given = p.oracle(old_logprobs=out.logprobs.float())
    torch.testing.assert_close(given, gradient, rtol=1e-4, atol=1e-6)


@on_backends()
@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16), 1000.0], ids=str)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_loss_scale(name, scale, use_backend):
    """fp16 under a GradScaler: the gradient is stored scaled, so that small entries are not 0."""
    p = problem(OBJECTIVES[name](), vocab=2000, dtype=torch.float16)
    scaled = p.run(lambda loss: loss * scale, backend=use_backend, loss_scale=scale, inplace=True)
    assert_matches(p, scaled, p.oracle(), float(scale))
    out, gradient = p.run(backend=use_backend)
    torch.testing.assert_close(scaled[0].loss, out.loss)
    assert torch.equal(scaled[0].token_loss, out.token_loss)
    plain, want = p.oracle()[1], p.oracle()[1] * float(scale)
    lost = (gradient == 0).sum() - (plain == 0).sum()
    assert (scaled[1] == 0).sum() - (want.half() == 0).sum() == 0 < lost


def test_a_grad_scaler_finds_its_gradients():
    p = problem(dk.dcpo(), vocab=2000, dtype=torch.float16)
    head = torch.nn.Linear(8, 2000, bias=False)
    torch.nn.init.normal_(head.weight, std=1.0)
    hidden = torch.randn(24, 8)
    gradients = []
    for autocast in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=autocast)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            logits = head(hidden)
        out = dk.policy_loss(
            logits, **p.arguments, loss_scale=scaler.get_scale() if autocast else None
        )
        optimizer.zero_grad()
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer) if autocast else None
        gradients.append(head.weight.grad.clone())
    error = (gradients[1] - gradients[0]).abs().max()
    assert error < 4e-3 * gradients[0].abs().max()


@on_backends("reference", *CPU[:1])
@pytest.mark.parametrize(
    "case",
    pairs(name=tuple(OBJECTIVES), aggregation=AGGREGATIONS, layout=("packed", "padded")),
    ids=label,
)
def test_micro_batches_add_up(case, use_backend):
    name, aggregation, layout = case.values()
    objective = OBJECTIVES[name](aggregation=aggregation, kl_coef=0.1)
    p = problem(objective, layout=layout, importance="response")
    out, gradient = p.run(backend=use_backend)
    a = dict(p.arguments)
    lengths = a["lengths"] if layout == "packed" else a["mask"].sum(1)
    totals = {"num_responses": int((lengths > 0).sum()), "num_tokens": lengths.sum()}
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    loss, parts, token_loss = 0.0, [], []
    for begin, end in itertools.pairwise((0, 2, 2, 5)):  # the one in the middle is empty
        rows = slice(ends[begin], ends[end]) if layout == "packed" else slice(begin, end)
        part = {
            key: value[slice(begin, end) if value.shape[0] == 5 else rows]
            for key, value in a.items()
            if torch.is_tensor(value)
        }
        leaf = p.base[rows].clone().requires_grad_()
        micro = dk.policy_loss(leaf, **{**a, **part}, **totals, backend=use_backend)
        micro.loss.backward()
        loss = loss + micro.loss.detach()
        parts.append(leaf.grad)
        token_loss.append(micro.token_loss)
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.cat(token_loss), out.token_loss, rtol=1e-6, atol=1e-7)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    "name", [n for n, objective in OBJECTIVES.items() if not objective().pulls_without_advantage]
)
def test_skip_zero_advantage(name, layout, per, use_backend):
    """The same loss and gradient, whatever lies in the rows that are not read."""
    p = problem(OBJECTIVES[name](), layout=layout, advantages=per)
    a = p.arguments
    a["advantages"][..., ::2] = 0.0
    rows = a["advantages"] if per == "token" else per_token(a["advantages"], a)
    skipped = (rows == 0) & p.counts
    by_response = p.arguments["objective"].by_response
    if by_response:  # a response's ratio needs all of its tokens
        index = per_token(torch.arange(5), a)
        skipped = p.counts & ~torch.isin(index, index[(rows != 0) & p.counts])
    read = p.counts & ~skipped
    assert read.any() and (skipped.any() or (by_response and per == "token"))

    out, gradient = p.run(backend=use_backend, with_entropy=True)
    p.logits[skipped] = torch.nan
    out2, gradient2 = p.run(backend=use_backend, with_entropy=True, skip_zero_advantage=True)
    assert torch.equal(out.loss, out2.loss)
    assert torch.equal(gradient, gradient2)
    assert torch.equal(out.response_loss, out2.response_loss)
    for key in PER_TOKEN:
        one, two = getattr(out, key), getattr(out2, key)
        assert torch.equal(one[read], two[read]), key
        assert (two[skipped] == (1 if key == "ratio" else 0)).all(), key


@on_backends()
@pytest.mark.parametrize(
    "objective",
    [
        *(OBJECTIVES[name](**{key: 0.1}) for name in ("dcpo", "gspo") for key in COEFFICIENTS),
        *(o() for o in OBJECTIVES.values() if o().pulls_without_advantage),
    ],
    ids=lambda objective: f"{objective.name}-{objective.divergence}-{objective.kl_coef}",
)
def test_zero_advantage_is_not_skipped_where_something_else_pulls(objective, use_backend):
    p = problem(objective)
    p.arguments["advantages"][::2] = 0.0
    assert_same(p, {"skip_zero_advantage": True}, use_backend)
    assert (p.run(skip_zero_advantage=True, backend=use_backend)[1][::2] != 0).any()
