"""The operators as torch sees them (schema, fake, layouts), the losses under torch.compile, and the
reference's gradients against finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import CPU, EVERYWHERE, GPU, device_of, on_backends
from problems import DTYPES, OBJECTIVES, PER_TOKEN, label, pairs, problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.backends import reference
from dcpo_kernels.decide import binary_divergence
from dcpo_kernels.ops.records import (
    Grouping,
    Options,
    RatioGroups,
    Read,
    Responses,
    Results,
    RowCoefficients,
    Rows,
    RowStats,
    Targets,
    Tokens,
)

OF_LOGITS = [name for name in ops.__all__ if not name.startswith("linear")]  # test_linear: others
LAYOUTS = ("packed", "row-stride", "sliced", "time-major")
BACKENDS = ("reference", *CPU[:1])


def on_device(x: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def arguments_of(
    op: str,
    layout: str,
    dtype: torch.dtype,
    objective: dk.Objective | None = None,
    optional: bool = True,
    k: int | None = None,
):
    """What each operator is called with before `backend`, gradients recorded nowhere. optional:
    every argument that may be left out is there. k: targets of each row."""
    objective = objective or dk.dcpo(kl_coef=0.1, entropy_coef=0.1)
    p = problem(objective, layout=layout, dtype=dtype, lengths=(3, 0, 2), vocab=19)
    logits = p.view(p.base.nan_to_num())
    shape = logits.shape[:-1]
    ids = (torch.arange(shape.numel()) % 19).view(shape)
    one, two, three = torch.randn(3, *shape)
    numbers, options = objective.numbers, Options(0.7, True, 5.0 if optional else 0.0)
    count = shape[0] if len(shape) == 2 else 3
    grouping = Grouping(
        mask=three > 0 if optional or len(shape) == 2 else None,
        lengths=torch.tensor([2, 0, 3]) if len(shape) == 1 else None,
        aggregation=1,
        num_responses=None,
        num_tokens=100 if optional else None,
        max_length=None,
        num_responses_on_device=torch.tensor(50.0) if optional else None,
        num_tokens_on_device=None,
        max_length_on_device=None,
        skip_zero=one if optional else None,
        skip_by_response=False,
        skip_whole_responses=False,
    )
    if op == "token_weights":
        return ids, *grouping, [torch.randn(count)] * optional
    *responses, _ = ops.token_weights(ids, *grouping, [], "reference")
    responses = Responses(*responses)
    tokens = Tokens(
        old_logprobs=-one.abs() if optional else None,
        advantages=two,
        weights=responses.weights,
        ref_logprobs=one if objective.kl_coef else None,
        importance_weights=three.abs() if optional else None,
    )
    temperatures = 0.5 + one.abs() if optional else None
    several = ids if k is None else (ids[..., None] + torch.arange(k)) % 19
    targets = Targets(several, responses.mask, temperatures)
    if op == "row_stats":
        return logits, *targets, *options
    stats = RowStats(*ops.row_stats(logits, *targets, *options, "reference"))
    if op.startswith("row_gradient"):
        g = torch.randn(several.shape)
        ends = RowCoefficients(
            several, temperatures, stats.row_max, stats.log_sum, stats.entropy, g, two
        )
        if not optional:
            ends = ends._replace(entropy=None, h=None)
        return logits, *ends, torch.tensor(0.37) if optional else None, 0.7, options.softcap
    if op == "multiply_":
        return logits, torch.tensor(0.37)
    if op == "decide":
        groups = RatioGroups(optional, optional, responses.offsets, responses.lengths)
        return *Read(stats.logprobs, stats.entropy), *tokens, *numbers, *groups
    if op == "finish":
        clipped = (10 * one.abs()).to(torch.int8) % 5
        results = Results(one, stats.logprobs, stats.entropy, three.exp(), clipped)
        return *results, *responses
    topk = (None, None)
    if objective.needs_topk:
        topk = (ids[..., None] + torch.arange(3)) % 19, -torch.rand(*shape, 3)
    old_logits = torch.randn_like(logits) if objective.needs_old_logits else None
    rows = Rows(ids, temperatures, *topk, old_logits)
    arguments = (logits, *rows, *tokens, *numbers, *options)
    return arguments if op == "fused_" else (*arguments, True)


@on_backends(*BACKENDS, *GPU)
@pytest.mark.parametrize(
    "case",
    pairs(op=tuple(OF_LOGITS), layout=LAYOUTS, dtype=DTYPES, optional=(False, True)),
    ids=label,
)
def test_opcheck(case, use_backend):
    arguments, device = list(arguments_of(**case)), device_of(use_backend)
    if device != "cpu":
        arguments = tree_map_only(torch.Tensor, partial(on_device, device=device), arguments)
    torch.library.opcheck(getattr(ops, case["op"]), (*arguments, use_backend))


@on_backends(*BACKENDS)
@pytest.mark.parametrize("op", ["row_stats", "row_gradient", "row_gradient_"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_several_targets(layout, op, use_backend):
    arguments = arguments_of(op, layout, torch.bfloat16, k=3)
    torch.library.opcheck(getattr(ops, op), (*arguments, use_backend))


@on_backends(*BACKENDS)
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dppo-topk_tv", "dppo-kl"])
def test_opcheck_of_optional_arguments(name, optional, use_backend):
    objective, tests = OBJECTIVES[name](), ("test_schema", "test_faketensor")
    *given, _ = arguments_of("fused", "sliced", torch.bfloat16, objective, optional)
    for with_gradient in (True, False):
        arguments = (*given, with_gradient, use_backend)
        torch.library.opcheck(ops.fused, arguments, test_utils=tests)


@on_backends(*BACKENDS)
@pytest.mark.parametrize(
    "wrong, error, words",
    [
        ({"advantages": torch.ones(1).expand(5)}, ValueError, "advantages must be contiguous"),
        ({"advantages": torch.ones(4)}, ValueError, r"advantages .* 5 values, got shape \[4\]"),
        ({"weights": torch.ones(5).half()}, TypeError, "weights must be torch.float32, got .*16"),
        ({"target_ids": torch.ones(5).int()}, TypeError, "target_ids must be torch.int64"),
        ({"old_logprobs": torch.ones(5, 2)[:, 0]}, ValueError, "old_logprobs .* strides \\[2\\]"),
    ],
)
def test_direct_callers_are_checked_too(wrong, error, words, use_backend):
    """The kernels get addresses: a tensor of other strides would be read past its end."""
    arguments = list(arguments_of("fused", "packed", torch.float32))
    for name, x in wrong.items():
        arguments[["logits", *Rows._fields, *Tokens._fields].index(name)] = x
    with pytest.raises(error, match=words):
        ops.fused(*arguments, use_backend)


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dcpo", "cispo-centered", "dppo-topk_kl", "penalty-kl"])
def test_which_rows_have_a_gradient(name, entropy_coef, use_backend):
    """Those that it is not all zeros in, whether it is written or not."""
    p = problem(OBJECTIVES[name](entropy_coef=entropy_coef), lengths=(30,))
    a, weights = p.arguments, torch.ones(30)
    a["advantages"][::3] = weights[::4] = 0.0
    p.base[[3, 5], 1] = torch.nan
    rows = Rows(a["target_ids"], None, *map(a.get, Rows._fields[2:]))
    tokens = Tokens(a["old_logprobs"], a["advantages"], weights, None, None)
    given = [p.base, *rows, *tokens, *a["objective"].numbers, *Options(0.7, entropy_coef != 0)]
    device = device_of(use_backend)
    given = tree_map_only(torch.Tensor, partial(on_device, device=device), given)
    *_, has_gradient, gradient = ops.fused(*given, True, use_backend)
    assert has_gradient.tolist() == (gradient != 0).any(-1).int().tolist()
    assert has_gradient[3] == has_gradient[5] == 1 and not has_gradient[::4].any()
    *_, without, _ = ops.fused(*given, False, use_backend)
    assert torch.equal(without, has_gradient)
    *_, in_place = ops.fused_(*given, use_backend)
    assert torch.equal(in_place, has_gradient)


@on_backends(*BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OF_LOGITS)
def test_fake_results_are_like_the_real_ones(op, layout, use_backend):
    """Shape, dtype and strides; a gradient is contiguous whatever the logits are."""
    arguments = arguments_of(op, layout, torch.bfloat16)
    with FakeTensorMode() as mode:
        faked = tree_map_only(torch.Tensor, mode.from_tensor, list(arguments))
        fake = getattr(ops, op)(*faked, use_backend)
    real = getattr(ops, op)(*arguments, use_backend)

    def described(results):
        flat = tree_leaves(results)
        return [x if x is None else (x.shape, x.dtype, x.stride(), x.device) for x in flat]

    assert described(real) == described(fake)
    if op in ("fused", "row_gradient"):
        gradient = real[-1] if op == "fused" else real
        assert gradient.is_contiguous() and gradient.shape == arguments[0].shape


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 7])  # elements off a 16-byte boundary
@pytest.mark.parametrize("rows, vocab", [(0, 9), (2, 1), (3, 15), (2, 4099), (1, 3_000_001)])
def test_multiply_writes_its_rows_and_nothing_beside_them(rows, vocab, start, dtype, use_backend):
    buffer = torch.randn(rows, start + vocab + 9, device=device_of(use_backend)).to(dtype)
    for factor in torch.tensor([1.0, 0.3], device=buffer.device):
        x = buffer[:, start : start + vocab]
        expected = buffer.clone()
        expected[:, start : start + vocab] = (x.float() * factor).to(dtype)
        ops.multiply_(x, factor, use_backend)
        assert torch.equal(buffer, expected)


def test_schemas_say_what_is_written():
    for name in ops.__all__:
        schema = getattr(ops, name)._schema
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if name.startswith("linear"):
            assert written == [x for x in ("kept_logits", "into") if f"? {x}" in str(schema)]
        else:
            assert written == ([schema.arguments[0].name] if name.endswith("_") else [])
        assert torch.Tag.needs_fixed_stride_order in getattr(ops, name).tags


class Dispatched(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@on_backends()
@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize(
    "name, most", [("dcpo", 8), ("grpo", 8), ("dppo-topk_tv", 8), ("gspo", 12)]
)
def test_nothing_around_the_kernel(name, most, per, layout, inplace, use_backend):
    """On a GPU each operator is a launch."""
    p = problem(OBJECTIVES[name](), layout=layout, advantages=per)
    logits = p.base.clone().requires_grad_() * 1
    with Dispatched() as mode:
        out = dk.policy_loss(logits, **p.arguments, inplace=inplace, backend=use_backend)
        torch.autograd.grad(out.loss, logits)
    assert len(mode.names) <= most, mode.names


# ---- torch.compile ------------------------------------------------------------------------------


def batch(tokens: int, responses: int, vocab: int = 37, dtype=torch.float32):
    """Packed tokens in responses of uneven length, one of them empty."""
    draw = torch.Generator().manual_seed(tokens)
    cuts = torch.randint(tokens + 1, (responses - 2,), generator=draw).sort().values
    ends = torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([tokens])])
    normal = torch.randn(2, tokens, generator=draw)
    logits = (2 * torch.randn(tokens, vocab, generator=draw)).to(dtype)
    return {
        "logits": logits.requires_grad_(),
        "target_ids": torch.randint(vocab, (tokens,), generator=draw),
        "old_logprobs": -3 + 0.5 * normal[0],
        "advantages": torch.randn(responses, generator=draw),
        "lengths": ends.diff(),
    }


def policy(logits, target_ids, old_logprobs, advantages, lengths, *, inplace=False, **options):
    logits = logits * 1.5 if inplace else logits  # in place wants what the model just made
    return dk.policy_loss(
        logits, target_ids, old_logprobs, advantages, lengths=lengths, inplace=inplace, **options
    )


def padded(logits, target_ids, old_logprobs, advantages, lengths, **options):
    """The same tokens as one response a row, read through a slice."""
    logits = torch.stack([logits, logits.flip(0)])[:, :-1]
    ids, old = (torch.stack([x, x.flip(0)])[:, :-1] for x in (target_ids, old_logprobs))
    return dk.policy_loss(logits, ids, old, advantages[:2], mask=ids > 3, **options)


def selected(
    logits, target_ids, *_, lengths=None, old_logprobs=None, advantages=None, k=1, **options
):
    if k > 1:
        target_ids = (target_ids[:, None] + torch.arange(k)) % logits.shape[-1]
    logprobs, entropy = dk.selected_logprobs(logits, target_ids, **options)
    return dk.PolicyLoss(
        (logprobs * 0.3).sum() + (entropy**2).mean(), *[logprobs, entropy][:1], *[None] * 7
    )


COMPILED = {
    "dcpo": (policy, {"objective": dk.dcpo()}),
    "dcpo in place": (policy, {"objective": dk.dcpo(), "inplace": True}),
    "dcpo padded": (padded, {"objective": dk.dcpo(), "temperature": 0.7}),
    "grpo": (policy, {"objective": dk.grpo(entropy_coef=0.1), "with_entropy": True}),
    "gspo": (policy, {"objective": dk.gspo(), "with_entropy": True}),
    "selected": (selected, {"with_entropy": True, "temperature": 0.7}),
    "three selected": (selected, {"with_entropy": True, "k": 3}),
}


def assert_compiled_agrees(compiled, eager, data, **options):
    found = compiled(**data, **options)
    (gradient,) = torch.autograd.grad(0.37 * found.loss, data["logits"])
    want = eager(**data, **options)
    (want_gradient,) = torch.autograd.grad(0.37 * want.loss, data["logits"])
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(gradient, want_gradient, **close)
    torch.testing.assert_close(found.loss, want.loss, **close)
    for key in (*PER_TOKEN, "response_loss", "mask"):
        one, two = getattr(found, key), getattr(want, key)
        assert (one is None) == (two is None)
        if two is not None:
            torch.testing.assert_close(one, two, **close)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@on_backends(*BACKENDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, use_backend):
    """The whole call in one graph, with Inductor for the first and without it for the others."""
    function, options = COMPILED[name]
    options = {**options, "backend": use_backend}
    how = {} if name == "dcpo in place" else {"backend": "aot_eager"}
    compiled = torch.compile(function, fullgraph=True, dynamic=True, **how)
    assert_compiled_agrees(compiled, function, batch(23, 4), **options)
    assert_compiled_agrees(compiled, function, batch(58, 6, vocab=64), **options)


@on_backends(*BACKENDS)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_compiled_with_one_response(name, use_backend):
    options = {"objective": OBJECTIVES[name](), "backend": use_backend}
    data = {**batch(9, 3), "advantages": torch.tensor([0.5]), "lengths": torch.tensor([9])}
    compiled = torch.compile(policy, fullgraph=True, dynamic=True)
    assert_compiled_agrees(compiled, policy, data, **options)


@on_backends(*BACKENDS)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_no_recompilation_from_one_step_to_the_next(name, use_backend):
    """Numbers of tokens and responses, lengths, and all values change with each step."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(policy, fullgraph=True, dynamic=True, backend=counter)
    options = {"objective": OBJECTIVES[name](), "backend": use_backend}
    assert_compiled_agrees(compiled, policy, batch(23, 4), **options)
    first = counter.frame_count
    for tokens, responses in ((24, 4), (70, 9), (5, 3), (128, 17)):
        assert_compiled_agrees(compiled, policy, batch(tokens, responses), **options)
        assert counter.frame_count == first
    totals = []
    for responses, tokens in ((7, 100), (9, 77), (31, 4000)):  # another signature: one more
        options |= {"num_responses": responses, "num_tokens": tokens, "max_length": tokens}
        assert_compiled_agrees(compiled, policy, batch(responses, 5), **options)
        totals.append(counter.frame_count)
    assert totals[0] > first and len(set(totals)) == 1


@on_backends(*BACKENDS)
def test_compiled_lengths_that_do_not_add_up(use_backend):
    """Compiled code does not look at them, nor a GPU: nothing may be read outside the rows, and no
    row may count twice."""
    options = {"objective": dk.gspo(), "backend": use_backend}
    compiled = torch.compile(policy, fullgraph=True, dynamic=True, backend="aot_eager")
    data = batch(6, 3)
    data["advantages"] = data["advantages"][:, None]  # one per response, also where 3 rows are used
    for lengths in ([2, 100, 3], [-5, 6, 0], [9, -3, 0], [2, 1, 0]):
        found = compiled(**{**data, "lengths": torch.tensor(lengths)}, **options)
        ends = torch.tensor(lengths).cumsum(0).clamp(0, 6).cummax(0).values
        used = int(ends[-1])
        first = {key: x[:used] if len(x) == 6 else x for key, x in data.items()}
        first["lengths"] = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        want = policy(**first, **options)
        torch.testing.assert_close(found.response_loss, want.response_loss)
        torch.testing.assert_close(found.loss, want.loss)
        assert (found.token_loss[used:] == 0).all()


@pytest.mark.xfail(strict=True, reason="a float argument of an operator is a constant to Dynamo")
@on_backends(*BACKENDS)
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_no_recompilation_for_another_number(name, use_backend):
    """A temperature or a clip that moves with training progress."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(policy, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for step in range(3):
        moving = (0.1 + 0.01 * step, 0.2 + 0.01 * step)
        objective = dk.dcpo(*moving) if name == "dcpo" else dk.gspo(*moving)
        options = {"objective": objective, "temperature": 0.7 + 0.1 * step, "backend": use_backend}
        assert_compiled_agrees(compiled, policy, batch(23 + step, 4), **options)
        counts.append(counter.frame_count)
    assert len(set(counts[1:])) == 1, f"graphs after each step: {counts}"


# ---- the reference ------------------------------------------------------------------------------


def frozen_loss(p, out, rows):
    """The loss with the ratios and masks of `out` as constants: what an objective that detaches
    them has the gradient of (CISPO eq. 4, DPPO eq. 6)."""
    a, o = p.arguments, p.arguments["objective"]
    logp, entropy = dk.selected_logprobs(
        rows, a["target_ids"], temperature=a["temperature"], with_entropy=True, backend="reference"
    )
    token_weights = dk.token_weights(a["lengths"], o.aggregation)
    A, w = a["advantages"], out.ratio
    weight = w.clamp(max=o.ratio_cap).maximum(torch.where(A < 0, o.floor_low, o.floor_high))
    weight = weight * a["importance_weights"]
    if o.surrogate == "gamma":
        k, eps = (
            torch.where(A < 0, *pair).double()
            for pair in ((o.power_low, o.power_high), (o.eps_low, o.eps_high))
        )
        weight = w**k * (eps * (1 - w)).exp()
    terms = -A * (out.clipped != 4) * weight * logp - o.entropy_coef * entropy
    if o.score_centering:  # arXiv 2609.20807
        z, held = (x.double() / a["temperature"] for x in (rows, p.base))
        log_p, p_v = (x.log_softmax(-1).gather(1, a["topk_ids"]) for x in (z, held))
        p_v, q_v = p_v.exp(), a["topk_logprobs"].double().exp()
        floor = torch.where(A < 0, o.floor_low, o.floor_high)[:, None]
        rho = ((1 - q_v.sum(1)) / (1 - p_v.sum(1)))[:, None]
        f, f_rest = (r.clamp(max=o.ratio_cap).maximum(floor) for r in (p_v / q_v, 1 / rho))
        centre = ((q_v * f - rho * f_rest * p_v) * log_p).sum(1)
        terms = terms + A * a["importance_weights"] * centre
    for kl, anchor in (("kl", a["ref_logprobs"]), ("old_kl", a["old_logprobs"])):
        d = anchor - logp
        estimates = {"k3": torch.expm1(d) - d, "abs": d.abs()}
        estimates["k3_unbiased"] = (logp - a["old_logprobs"]).exp() * estimates["k3"]
        terms = terms + getattr(o, f"{kl}_coef") * estimates[getattr(o, f"{kl}_estimator")]
    if o.penalty_coef:
        keys = ("temperature", "topk_ids", "topk_logprobs", "old_logits")
        more = {key: a[key] for key in keys if key in a}
        kind = o.numbers.divergence
        D = reference.divergence(kind, rows, a["target_ids"], a["old_logprobs"].double(), **more)
        if D is None:
            D = binary_divergence(kind, logp, a["old_logprobs"].double())
        limit = torch.where(a["advantages"] < 0, o.limit_low, o.limit_high)
        terms = terms + o.penalty_coef * (D - limit).relu()
    return (token_weights * terms).sum()


def finite_differences(function, x, step=1e-6):
    """The gradient of a scalar function; gradcheck would go backward twice."""
    with torch.no_grad():
        steps = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        slopes = [(function(x + dx) - function(x - dx)) / (2 * step) for dx in steps]
    return torch.stack(slopes).view(x.shape)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck_of_the_reference(name):
    objective = OBJECTIVES[name](kl_coef=0.3, entropy_coef=0.2)
    p = problem(objective, vocab=5, lengths=(2, 0, 2), temperature=0.7, importance="token")
    if name == "up":  # with A > 0 its ratio is that of the policy to itself, always 1
        p.arguments["advantages"] = -p.arguments["advantages"].abs()
    if p.arguments.get("old_logits") is not None:
        p.arguments["old_logits"] = p.arguments["old_logits"].double()
    rows = p.base.double().requires_grad_()

    def loss(rows):
        return dk.policy_loss(rows, **p.arguments, backend="reference").loss

    if objective.surrogate not in ("reinforce", "gamma"):
        (gradient,) = torch.autograd.grad(loss(rows), rows)
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(gradient, finite_differences(loss, rows), **close)
        return
    out = dk.policy_loss(rows, **p.arguments, backend="reference")
    assert torch.autograd.gradcheck(lambda x: frozen_loss(p, out, x), rows, atol=1e-7, rtol=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, rows)
    (expected,) = torch.autograd.grad(frozen_loss(p, out, rows), rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
