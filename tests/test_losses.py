"""policy_loss and selected_logprobs on every backend, against float64 autograd of the reference."""

from __future__ import annotations

import functools
import itertools
from functools import partial

import pytest
import torch
from conftest import KERNELS, on_backends, on_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    CODES,
    DTYPES,
    LAYOUTS,
    OBJECTIVES,
    PER_TOKEN,
    ROUNDING,
    assert_matches,
    pairs,
    problem,
)

import dcpo_kernels as dk
from dcpo_kernels.objective import AGGREGATIONS

NAN = float("nan")
SETTINGS = pairs(
    objective=tuple(OBJECTIVES),
    aggregation=AGGREGATIONS,
    layout=LAYOUTS,
    dtype=DTYPES,
    temperature=(1.0, 0.7, 2.5),
    kl_coef=(0.0, 0.05),
    entropy_coef=(0.0, 0.01),
    importance=(None, "token", "response"),
    advantages=("token", "response"),
    inplace=(False, True),
    with_entropy=(False, True),
)
on_objectives = pytest.mark.parametrize("name", OBJECTIVES)
fused_and_sequence = pytest.mark.parametrize("name", ["dcpo", "gspo"])
COEFFICIENTS = ("kl_coef", "entropy_coef")
modes = pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])


def label(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@functools.cache
def solved(number):
    """The problem of a setting and what the oracle says of it."""
    case = SETTINGS[number]
    coefficients = {key: case[key] for key in ("aggregation", "kl_coef", "entropy_coef")}
    objective = OBJECTIVES[case["objective"]](**coefficients)
    keys = ("layout", "dtype", "temperature", "importance", "advantages")
    p = problem(objective, **{key: case[key] for key in keys})
    return p, p.oracle(with_entropy=case["with_entropy"])


@on_backends()
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=map(label, SETTINGS))
def test_values_and_gradient(number, use_backend):
    case = SETTINGS[number]
    p, expected = solved(number)
    out, gradient = p.run(
        backend=use_backend, inplace=case["inplace"], with_entropy=case["with_entropy"]
    )
    assert_matches(p, (out, gradient), expected)

    assert gradient.dtype == case["dtype"]
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


def test_settings_meet_in_pairs():
    for objective in OBJECTIVES:
        met = [case for case in SETTINGS if case["objective"] == objective]
        for key, count in (("aggregation", 5), ("layout", 5), ("dtype", 3), ("inplace", 2)):
            assert len({case[key] for case in met}) == count


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


@on_backends()
@pytest.mark.parametrize(
    "case",
    pairs(upstream=tuple(UPSTREAM), name=("dcpo", "gspo"), dtype=DTYPES, inplace=(False, True)),
    ids=label,
)
def test_upstream_gradient(case, use_backend):
    name, dtype, inplace = case["name"], case["dtype"], case["inplace"]
    upstream, scale = UPSTREAM[case["upstream"]]
    p = problem(OBJECTIVES[name](entropy_coef=0.01), layout="sliced", dtype=dtype)
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


# ---- in place, and what saved tensors are good for ----------------------------------------------


@on_kernels()
@pytest.mark.parametrize(
    "case", pairs(name=tuple(OBJECTIVES), layout=LAYOUTS, dtype=DTYPES), ids=label
)
def test_in_place_gives_the_same_bits(case, use_backend):
    objective = OBJECTIVES[case["name"]](entropy_coef=0.01)
    p = problem(objective, layout=case["layout"], dtype=case["dtype"])
    out, gradient = p.run(backend=use_backend)
    out2, gradient2 = p.run(backend=use_backend, inplace=True)
    assert torch.equal(gradient, gradient2)
    for one, two in zip(out, out2, strict=True):
        assert torch.equal(one, two)


def recorded(p, inplace, use_backend, produce=torch.clone):
    """A leaf, logits made from it, and their loss."""
    leaf = p.base.clone().requires_grad_()
    logits = p.view(produce(leaf))
    return leaf, logits, dk.policy_loss(logits, **p.arguments, inplace=inplace, backend=use_backend)


@on_kernels()
@fused_and_sequence
def test_in_place_writes_the_gradient_over_the_logits_and_nothing_else(name, use_backend):
    p = problem(OBJECTIVES[name](), layout="row-stride")
    base = p.base.clone()
    logits = p.view(base).requires_grad_() * 1  # a copy of V columns
    padded = torch.full_like(base, 7.0)
    view = p.view(padded)
    view.copy_(logits.detach())
    view = view.requires_grad_().view_as(view)
    before = view._version
    out = dk.policy_loss(view, **p.arguments, inplace=True, backend=use_backend)
    out.loss.backward()
    assert view._version > before
    assert torch.equal(view, p.run(backend=use_backend)[1])
    assert (padded[:, p.logits.shape[1] :] == 7).all()


@on_kernels()
@fused_and_sequence
def test_a_second_reader_of_logits_taken_in_place_fails(name, use_backend):
    p = problem(OBJECTIVES[name]())

    leaf, logits, out = recorded(p, True, use_backend)
    if name == "dcpo":  # overwritten already; gspo overwrites in its backward
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _, logits, _ = recorded(p, False, use_backend)
            other = dk.selected_logprobs(logits, p.arguments["target_ids"], backend=use_backend)
            out = dk.policy_loss(logits, **p.arguments, inplace=True, backend=use_backend)
            (other[0].sum() + out.loss).backward()

    # A reader that comes first and needs the logits for its backward.
    leaf = p.base.clone().requires_grad_()
    logits = leaf.clone()
    other = (logits**2).sum()
    out = dk.policy_loss(logits, **p.arguments, inplace=True, backend=use_backend)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()

    # What made the logits and saved them: a soft cap.
    _, _, out = recorded(p, True, use_backend, torch.tanh)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@on_kernels()
@modes
@fused_and_sequence
def test_second_backward(name, inplace, use_backend):
    _, _, out = recorded(problem(OBJECTIVES[name]()), inplace, use_backend)
    (0.5 * out.loss).backward(retain_graph=True)
    if name == "gspo" and not inplace:  # nothing was overwritten: the gradient is made anew
        out.loss.backward()
        return
    with pytest.raises(RuntimeError, match=r"second time through one policy_loss.*call .* again"):
        out.loss.backward()


@on_backends()
@pytest.mark.parametrize("name", ["dcpo", "gspo", "selected_logprobs"])
def test_first_derivatives_in_reverse_mode_and_nothing_else(name, use_backend):
    p = problem(dk.gspo() if name == "gspo" else dk.dcpo())

    def loss(logits):
        if name == "selected_logprobs":
            ids = p.arguments["target_ids"]
            return dk.selected_logprobs(logits, ids, backend=use_backend)[0].sum()
        return dk.policy_loss(logits, **p.arguments, backend=use_backend).loss

    leaf = p.base.clone().requires_grad_()
    first = "first derivatives in reverse mode"
    with pytest.raises(RuntimeError, match=first):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=first):
        torch.autograd.grad(scale * loss(leaf), leaf, create_graph=True)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=first):
            transform(loss)(p.base)
    with pytest.raises(RuntimeError, match=first):
        torch.func.jvp(loss, (p.base,), (torch.ones_like(p.base),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.base, torch.ones_like(p.base))
        with pytest.raises(RuntimeError, match=first):
            loss(dual)


@on_backends()
@fused_and_sequence
def test_functional_leaves_everything_untouched(name, use_backend):
    p = problem(OBJECTIVES[name](kl_coef=0.1), layout="padded", importance="token")
    tensors = {k: v for k, v in p.arguments.items() if torch.is_tensor(v)} | {"base": p.base}
    before = {key: (x.clone(), x._version) for key, x in tensors.items()}
    leaf = p.base.requires_grad_()
    dk.policy_loss(p.view(leaf), **p.arguments, backend=use_backend).loss.backward()
    leaf.requires_grad_(False)
    for key, (copy, version) in before.items():
        assert torch.equal(tensors[key].view(torch.uint8), copy.view(torch.uint8)), key
        assert tensors[key]._version == version, key


@on_backends()
@on_objectives
def test_without_grad_the_values_are_the_same(name, use_backend):
    p = problem(OBJECTIVES[name](), layout="sliced", dtype=torch.bfloat16)
    out, _ = p.run(backend=use_backend, with_entropy=True)
    logits = p.base.clone()
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            evaluated = dk.policy_loss(
                p.view(logits), **p.arguments, with_entropy=True, backend=use_backend
            )
        assert not evaluated.loss.requires_grad
        for one, two in zip(out, evaluated, strict=True):
            assert torch.equal(one, two)
    assert torch.equal(logits.view(torch.uint8), p.base.view(torch.uint8))


# ---- the same thing said in another way ---------------------------------------------------------


def assert_same(p, changes, use_backend, equal=True):
    out, gradient = p.run(backend=use_backend)
    out2, gradient2 = p.run(backend=use_backend, **changes)
    assert torch.equal(gradient, gradient2) == equal
    assert torch.equal(out.loss, out2.loss) == equal


@on_backends("reference", *KERNELS[:1])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@fused_and_sequence
def test_other_types_of_the_same_arguments(name, layout, use_backend):
    p = problem(
        OBJECTIVES[name](kl_coef=0.1), layout=layout, advantages="response", importance="response"
    )
    a = p.arguments
    same = partial(assert_same, p, use_backend=use_backend)
    lengths = a["lengths"] if layout == "packed" else a["mask"].sum(1)

    def per_token(x):
        return x.repeat_interleave(lengths) if layout == "packed" else x[:, None].expand(5, 11)

    same({"advantages": per_token(a["advantages"])})
    same({"importance_weights": per_token(a["importance_weights"])})
    same({"target_ids": a["target_ids"].int()})
    same({key: a[key].double() for key in ("old_logprobs", "ref_logprobs", "advantages")})
    same({"old_logprobs": a["old_logprobs"].clone().requires_grad_()})  # taken as a constant
    same({"advantages": -a["advantages"]}, equal=False)
    strided = torch.stack([a["old_logprobs"]] * 2, -1)[..., 0]
    assert not strided.is_contiguous()
    same({"old_logprobs": strided})
    if layout == "packed":
        for other in (lengths.tolist(), tuple(lengths.tolist()), lengths.int(), lengths.numpy()):
            same({"lengths": other})
    else:
        mask = a["mask"]
        for other in (mask.float(), mask.int() * 3, mask.bfloat16(), mask.to(torch.uint8)):
            same({"mask": other})


@on_backends("reference", *KERNELS[:1])
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


@on_backends()
@fused_and_sequence
def test_one_response_padded(name, use_backend):
    """[1] per response: spread over the tokens it has a stride of 0, which no kernel may see."""
    p = problem(
        OBJECTIVES[name](), layout="padded", lengths=(9,), advantages="response",
        importance="response", temperature=0.7,
    )  # fmt: skip
    shape = p.counts.shape
    per_token = {
        key: p.arguments[key].expand(shape) for key in ("advantages", "importance_weights")
    }
    out, gradient = p.run(backend=use_backend)
    for changes in (per_token, {key: x.clone() for key, x in per_token.items()}):
        out2, gradient2 = p.run(backend=use_backend, **changes)
        assert torch.equal(gradient, gradient2) and torch.equal(out.token_loss, out2.token_loss)
    assert_matches(p, (out, gradient), p.oracle())


@on_backends()
@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize(
    "case",
    pairs(name=tuple(OBJECTIVES), layout=LAYOUTS, dtype=DTYPES),
    ids=label,
)
def test_a_temperature_for_each(case, per, use_backend):
    """Rows of temperature T are rows of logits over T at temperature 1."""
    name, layout, dtype = case.values()
    p = problem(OBJECTIVES[name](entropy_coef=0.01), layout=layout, dtype=dtype)
    mask = p.arguments.get("mask")
    count = p.counts.numel() if per == "token" else 5
    temperatures = 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(1))
    if per == "token":
        temperatures = temperatures.view(p.counts.shape)
        rows = temperatures
    elif mask is None:
        rows = temperatures.repeat_interleave(p.arguments["lengths"])
    else:
        rows = temperatures[:, None].expand(mask.shape)
    p.arguments["temperature"] = temperatures
    found = p.run(backend=use_backend, with_entropy=True)
    want = p.oracle(with_entropy=True)
    assert torch.equal(found[0].clipped, want[0].clipped)
    divided = {"temperature": 1.0}
    if p.arguments.get("old_logits") is not None:
        divided["old_logits"] = p.arguments["old_logits"].double() / rows[..., None].double()
    leaf = p.logits.double().requires_grad_()
    arguments = {**p.arguments, **divided, "with_entropy": True, "backend": "reference"}
    one = dk.policy_loss(leaf / rows[..., None].double(), **arguments)
    (one_gradient,) = torch.autograd.grad(one.loss, leaf)
    torch.testing.assert_close(want[0].token_loss, one.token_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        want[1].nan_to_num(), one_gradient.nan_to_num(), rtol=1e-5, atol=1e-8
    )
    p.arguments["temperature"] = rows  # what assert_matches takes the slack from
    assert_matches(p, found, want)


@on_backends()
@pytest.mark.parametrize(
    "case", pairs(name=tuple(OBJECTIVES), layout=LAYOUTS, dtype=DTYPES, inplace=(0, 1)), ids=label
)
def test_on_policy(case, use_backend):
    """old_logprobs=None: the ratio is 1 for every token, and the gradient is that of the ratio."""
    name, layout, dtype, inplace = case.values()
    p = problem(OBJECTIVES[name](kl_coef=0.05), layout=layout, dtype=dtype, importance="token")
    p.arguments["old_logprobs"] = None
    out, gradient = p.run(backend=use_backend, inplace=bool(inplace))
    want = p.oracle()
    assert_matches(p, (out, gradient), want)
    assert (out.ratio == 1).all()
    if p.arguments["objective"].divergence != "none":  # a log-ratio of 1e-8 is one that moves
        return
    # The same as log-probabilities that were taken from these logits just before.
    logprobs = want[0].logprobs.float()
    given = p.run(backend="reference", inplace=False, dtype=torch.float64, old_logprobs=logprobs)
    torch.testing.assert_close(given[1], want[1], rtol=1e-4, atol=1e-6)


@on_backends()
@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl", "penalty-tv", "penalty-kl"])
def test_old_logits_of_another_dtype(name, use_backend):
    """They come from another engine."""
    p = problem(OBJECTIVES[name](), layout="sliced", dtype=torch.bfloat16, vocab=67)
    old_logits = p.arguments["old_logits"]
    for dtype in (torch.float32, torch.float16):
        finer = old_logits.to(dtype) + 0.001 * torch.randn(old_logits.shape).to(dtype)
        leaf = p.base.clone().requires_grad_()
        arguments = {**p.arguments, "old_logits": finer}
        out = dk.policy_loss(p.view(leaf), **arguments, backend=use_backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        exact = p.base.double().requires_grad_()
        arguments["old_logits"] = finer.double()
        want = dk.policy_loss(p.view(exact), **arguments, backend="reference")
        (want_gradient,) = torch.autograd.grad(want.loss, exact)
        assert_matches(p, (out, p.view(gradient)), (want, p.view(want_gradient)))


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


@on_backends("reference", *KERNELS[:1])
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


@on_backends()
@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "penalty" not in name])
def test_skip_zero_advantage(name, layout, per, use_backend):
    p = problem(OBJECTIVES[name](), layout=layout, advantages=per)
    A = p.arguments["advantages"]
    A[..., ::2] = 0.0
    if layout == "packed":
        rows = A if per == "token" else A.repeat_interleave(p.arguments["lengths"])
        index = torch.arange(5).repeat_interleave(p.arguments["lengths"])
    else:
        rows = A if per == "token" else A[:, None].expand(p.counts.shape)
        index = torch.arange(5)[:, None].expand(p.counts.shape)
    skipped = (rows == 0) & p.counts
    if name == "gspo":  # a response's ratio needs all of its tokens
        needed = index[(rows != 0) & p.counts]
        skipped = p.counts & ~torch.isin(index, needed)
    read = p.counts & ~skipped
    assert read.any() and (skipped.any() or (name, per) == ("gspo", "token"))

    out, gradient = p.run(backend=use_backend, with_entropy=True)
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
        *(OBJECTIVES[name]() for name in OBJECTIVES if "penalty" in name),
    ],
    ids=lambda objective: f"{objective.name}-{objective.divergence}-{objective.kl_coef}",
)
def test_zero_advantage_is_not_skipped_where_something_else_pulls(objective, use_backend):
    p = problem(objective)
    p.arguments["advantages"][::2] = 0.0
    assert_same(p, {"skip_zero_advantage": True}, use_backend)
    assert (p.run(skip_zero_advantage=True, backend=use_backend)[1][::2] != 0).any()


@on_backends()
@fused_and_sequence
def test_summarize_counts_what_was_read(name, use_backend):
    """Rows that skip_zero_advantage leaves out have results of 0, which are in no mean."""
    p = problem(OBJECTIVES[name](), lengths=(6, 5, 9, 4), advantages="response")
    p.arguments["advantages"][1::2] = 0.0
    whole = dk.summarize(p.run(backend=use_backend, with_entropy=True)[0])
    out, _ = p.run(backend=use_backend, with_entropy=True, skip_zero_advantage=True)
    found = dk.summarize(out)
    assert (whole["tokens"], whole["tokens_read"]) == (24, 24)
    assert (found["tokens"], found["tokens_read"]) == (24, 15)
    read = torch.tensor([True] * 6 + [False] * 5 + [True] * 9 + [False] * 4)
    assert found["logprob_mean"] == pytest.approx(float(out.logprobs[read].mean()), rel=1e-5)
    assert found["entropy_mean"] == pytest.approx(float(out.entropy[read].mean()), rel=1e-5)
    ratio = out.ratio[read]
    assert found["ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert (found["ratio_min"], found["ratio_max"]) == (float(ratio.min()), float(ratio.max()))
    assert found["approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)
    assert found["token_clipping_ratio"] == pytest.approx(float((out.clipped != 0).sum()) / 24)
    ratio = dk.token_clipping_ratio(out)
    assert found["token_clipping_ratio"] == pytest.approx(float(ratio))


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


@on_kernels()
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
    out, gradient = p.run(backend=use_backend)
    p.base = p.base + shift[:, None].float()
    out2, gradient2 = p.run(backend=use_backend)
    for one, two in zip((*out, gradient), (*out2, gradient2), strict=True):
        assert one is None or torch.equal(one, two)


@on_backends()
@PROPERTIES
@given(objective=objectives, batch=batches, garbage=st.sampled_from([NAN, torch.inf, -1e30]))
def test_tokens_that_do_not_count_have_no_influence(objective, batch, garbage, use_backend):
    p = problem(objective, layout="padded", importance="token", **batch)
    out, gradient = p.run(backend=use_backend, with_entropy=True)

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
    out2, gradient2 = p.run(backend=use_backend, with_entropy=True, **other)
    for one, two in zip((*out, gradient), (*out2, gradient2), strict=True):
        assert one.isfinite().all() and torch.equal(one, two)


# ---- selected_logprobs --------------------------------------------------------------------------


def selected(p, use_backend, upstream, **options):
    """logprobs, entropy and gradient; garbage where the mask is 0."""
    arguments = {"temperature": p.arguments["temperature"], "mask": p.arguments.get("mask")}
    dtype = options.pop("dtype", p.base.dtype)
    leaf = p.base.to(dtype, copy=True).requires_grad_()
    logprobs, entropy = dk.selected_logprobs(
        p.view(leaf.clone() if options.get("inplace") else leaf),
        p.arguments["target_ids"],
        **{**arguments, **options},
        backend=use_backend,
    )
    (gradient,) = torch.autograd.grad(upstream(logprobs, entropy), leaf)
    return logprobs.detach(), None if entropy is None else entropy.detach(), p.view(gradient)


def combine(logprobs, entropy, wants="both"):
    """A loss whose upstream gradients differ from token to token; None of it from one of the two
    where the other one alone is wanted."""
    draw = torch.Generator().manual_seed(3)
    c, d = torch.randn(2, *logprobs.shape, generator=draw).to(logprobs.dtype)
    return {
        "logprobs": lambda: (c * logprobs).sum(),
        "entropy": lambda: (d * entropy).sum(),
        "both": lambda: (c * logprobs).sum() + (d * entropy).sum(),
        "expanded": lambda: 0.3 * logprobs.sum() - 0.1 * entropy.sum(),  # gradients of stride 0
        "product": lambda: (logprobs * entropy).mean(),
    }[wants]()


WANTS = ("logprobs", "entropy", "both", "expanded", "product")


@on_backends()
@pytest.mark.parametrize(
    "case", pairs(layout=LAYOUTS, wants=WANTS, dtype=DTYPES, temperature=(1.0, 0.6)), ids=label
)
def test_selected_logprobs(case, use_backend):
    layout, wants, dtype, temperature = case.values()
    p = problem(dk.dcpo(), layout=layout, dtype=dtype, temperature=temperature)
    upstream = partial(combine, wants=wants)
    found = selected(p, use_backend, upstream, with_entropy=True)
    # The oracle differentiates plain PyTorch on the tokens that count.
    rows = p.logits[p.counts].double().requires_grad_()
    log_p = torch.log_softmax(rows / temperature, -1)
    logprobs, entropy = torch.zeros(2, *p.counts.shape, dtype=torch.float64)
    ids = p.arguments["target_ids"][p.counts][:, None]
    logprobs = logprobs.masked_scatter(p.counts, log_p.gather(1, ids))
    entropy = entropy.masked_scatter(p.counts, -(log_p.exp() * log_p).sum(-1))
    (expected,) = torch.autograd.grad(upstream(logprobs, entropy), rows)
    torch.testing.assert_close(found[0].double(), logprobs.detach(), rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(found[1].double(), entropy.detach(), rtol=2e-6, atol=4e-6)
    assert (found[2][~p.counts] == 0).all()
    error = (found[2][p.counts].double() - expected).abs()
    assert (error <= ROUNDING[dtype] * expected.abs() + 3e-5).all()


@on_kernels()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_logprobs_in_place(layout, dtype, use_backend):
    p = problem(dk.dcpo(), layout=layout, dtype=dtype)
    run = partial(selected, p, use_backend, combine, with_entropy=True)
    for one, two in zip(run(), run(inplace=True), strict=True):
        assert torch.equal(one, two)

    logits = p.base.clone().requires_grad_().clone()
    ids, mask = p.arguments["target_ids"], p.arguments.get("mask")
    logprobs, _ = dk.selected_logprobs(
        p.view(logits), ids, mask=mask, inplace=True, backend=use_backend
    )
    before = logits._version
    logprobs.sum().backward(retain_graph=True)
    assert logits._version > before
    with pytest.raises(RuntimeError, match="second time through one selected_logprobs"):
        logprobs.sum().backward()


@on_backends()
def test_selected_logprobs_without_entropy_or_grad(use_backend):
    p = problem(dk.dcpo(), layout="padded")
    logprobs, entropy, _ = selected(p, use_backend, lambda x, _: x.sum())
    assert entropy is None
    arguments = (p.base, p.arguments["target_ids"].int())
    evaluated, _ = dk.selected_logprobs(
        *arguments, mask=p.counts.float(), temperature=1.0, backend=use_backend
    )
    assert not evaluated.requires_grad and torch.equal(evaluated, logprobs)
    assert (evaluated[~p.counts] == 0).all()


@on_backends()
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_selected_logprobs_of_nothing(shape, use_backend):
    leaf = torch.zeros(shape, requires_grad=True)
    logprobs, entropy = dk.selected_logprobs(
        leaf, torch.zeros(shape[:-1]).long(), with_entropy=True, backend=use_backend
    )
    assert logprobs.shape == entropy.shape == shape[:-1]
    (logprobs.sum() + entropy.sum()).backward()
    assert leaf.grad.shape == shape
