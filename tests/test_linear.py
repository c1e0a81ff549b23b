"""Losses and log-probabilities from hidden states, against those of float64 logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backends import GPU, SLOW, device_of, on_backends
from linear_cases import VOCAB, Case, by_hand, close, off, on_cpu, on_every, rows
from problems import OBJECTIVES, moved, pairs

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.ops.records import (
    Head,
    Options,
    RowCoefficients,
    Rows,
    Targets,
    Tokens,
    Wanted,
)

SETTINGS = pairs(
    layout=("packed", "row-stride", "padded", "sliced", "time-major"),
    memory=(1, 7, None),
    advantages=("token", "response"),
    temperature=(0.7, "token", "response"),
    entropy_coef=(0.0, 0.05),
    bias=(False, True),
    skip=(False, True),
)


def check(name, backend, at, **extra):
    setting = dict(SETTINGS[at % len(SETTINGS)])
    memory, skip, bias = (setting.pop(key) for key in ("memory", "skip", "bias"))
    kl_coef, entropy_coef = 0.0 if skip else 0.1, setting.pop("entropy_coef")
    objective = OBJECTIVES[name](entropy_coef=entropy_coef, kl_coef=kl_coef)
    case = Case(objective, bias=bias, **setting)
    if skip:
        case.arguments["advantages"][::3] = 0.0
    options = {"skip_zero_advantage": skip, "with_entropy": True, **extra}
    limit = None if memory is None else rows(memory)
    found = case.run(backend, 3.0, memory_limit=limit, **options)
    close(found, case.oracle(3.0, **options))


@on_cpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses(name, use_backend):
    for at in range(3):
        check(name, use_backend, 3 * list(OBJECTIVES).index(name) + at)


@on_backends(*SLOW, *GPU)
@pytest.mark.parametrize("name", ["dcpo", "gspo", "cispo-centered", "dppo-tv"])
def test_losses_on_slow_backends(name, use_backend):
    check(name, use_backend, list(OBJECTIVES).index(name))


@on_cpu
@pytest.mark.parametrize("name", ["dcpo", "gspo", "dppo-tv"])
def test_what_a_model_does_to_its_logits(name, use_backend):
    """logits = cap * tanh(scale * x / cap), and logprobs from them too."""
    case = Case(OBJECTIVES[name](entropy_coef=0.05), layout="padded", temperature="response")
    if name == "dppo-tv":  # as this form takes them: neither scaled nor capped
        case.arguments["old_logits"] = case.arguments["old_logits"] * 2
    given = {"logit_scale": 0.5, "logit_softcap": 3.0, "memory_limit": rows(7)}

    def capped(logits):
        return 3 * torch.tanh(0.5 * logits / 3)

    old = case.arguments.get("old_logits")
    of_oracle = {} if old is None else {"old_logits": capped(old)}
    close(case.run(use_backend, **given), case.oracle(change=capped, **of_oracle))
    base, weight, bias = case.leaves()
    ids, mask = case.arguments["target_ids"], case.arguments["mask"]
    hidden = torch.where(mask[..., None], case.problem.view(base), 0.0)
    with torch.no_grad():
        found, _ = dk.linear_selected_logprobs(hidden, weight, ids, bias=bias, mask=mask, **given)
        wanted, _ = dk.selected_logprobs(capped(F.linear(hidden, weight, bias)), ids, mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("memory", [rows(5), None], ids=["made again", "kept"])
def test_a_function_as_objective(memory, use_backend):
    case = Case(dk.Objective("by hand", function=by_hand), layout="sliced")
    options = {"with_entropy": True}
    close(case.run(use_backend, memory_limit=memory, **options), case.oracle(**options))


@on_every
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_sampling_replay(name, use_backend):
    case = Case(OBJECTIVES[name](entropy_coef=0.05), layout="padded")
    target, counts = case.arguments["target_ids"], case.problem.counts
    kept = torch.rand(*target.shape, VOCAB).argsort(-1)[..., :9]
    kept[..., :1] = torch.where((kept == target[..., None]).any(-1), kept[..., 0], target)[
        ..., None
    ]
    kept[..., 6:][target % 2 == 0] = -1  # padding, where the target is not
    has = (kept == target[..., None]).any(-1)
    kept[..., 0] = torch.where(has, kept[..., 0], target)
    kept = torch.where(counts[..., None], kept, -1)
    case.arguments["kept_ids"] = kept
    found = case.run(use_backend, 2.0, memory_limit=rows(5))
    close(found, case.oracle(2.0))


@on_every
@pytest.mark.parametrize("memory", [rows(5), None], ids=["made again", "kept"])
@pytest.mark.parametrize("k", [None, 3])
def test_selected_logprobs(k, memory, use_backend):
    case, device = Case(dk.dcpo(), layout="padded"), device_of(use_backend)
    shape, mask = case.problem.counts.shape, case.arguments["mask"]
    ids = torch.randint(0, VOCAB, shape if k is None else (*shape, k))
    given = {"mask": mask, "with_entropy": True, "temperature": 0.7}
    base, *head = case.leaves(device=device)
    read = dk.linear_selected_logprobs(
        case.problem.view(base), head[0], ids.to(device), bias=head[1], memory_limit=memory,
        backend=use_backend, **moved(given, device),
    )  # fmt: skip
    wide, *wide_head = case.leaves(torch.float64)
    hidden = torch.where(mask[..., None], case.problem.view(wide), 0.0)
    want = dk.selected_logprobs(F.linear(hidden, *wide_head), ids, backend="reference", **given)
    upstream = [torch.randn(x.shape) for x in want]
    upstream[0][::2] = upstream[1][::2] = 0.0  # rows without a gradient
    gradients = torch.autograd.grad(read, (base, *head), [x.to(device) for x in upstream])
    wanted = torch.autograd.grad(want, (wide, *wide_head), [x.double() for x in upstream])
    for one, two in zip((*read, *gradients), (*want, *wanted), strict=True):
        assert off(one.detach().cpu(), two.detach()) <= 1e-5
    with torch.no_grad():
        again = dk.linear_selected_logprobs(
            case.problem.view(base), head[0], ids.to(device), bias=head[1], backend=use_backend,
            **moved(given, device),
        )  # fmt: skip
    for one, two in zip(again, want, strict=True):
        assert off(one.cpu(), two.detach()) <= 1e-5


# ---- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dcpo", "gspo", "function", "kept", "logprobs"])
def test_compiles_whole(name):
    case = Case(dk.gspo() if name == "gspo" else dk.dcpo(), layout="padded", bias=False)
    arguments = dict(case.arguments)
    if name == "function":
        arguments |= {"objective": by_hand, "with_entropy": True}
    if name == "kept":
        target, counts = arguments["target_ids"], case.problem.counts
        kept = torch.stack([target, (target + 1) % VOCAB], -1)
        arguments["kept_ids"] = torch.where(counts[..., None], kept, -1)

    def loss(hidden, weight):
        if name == "logprobs":
            ids, mask = arguments["target_ids"], arguments["mask"]
            return dk.linear_selected_logprobs(hidden, weight, ids, mask=mask)[0].square().sum()
        return dk.linear_policy_loss(hidden, weight, **arguments).loss

    def gradients(function):
        base, weight, _ = case.leaves()
        value = function(base * 1, weight)
        return value, *torch.autograd.grad(value, (base, weight))

    expected = gradients(loss)
    found = gradients(torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager"))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


@on_cpu
@pytest.mark.parametrize("most", [5, 64])
def test_opcheck(most, use_backend):
    case = Case(dk.dcpo(entropy_coef=0.1), bias=True)
    hidden, weight, bias = (x.detach() for x in case.leaves())
    count, ids = len(hidden), case.arguments["target_ids"]
    head, options = Head(weight, bias, False, rows(most)), Options(0.7, True)
    into, mask = torch.zeros_like(weight), torch.arange(count) % 3 > 0
    every, some = Wanted(True, True, True), Wanted(True, False, True)

    def check(name, *arguments):
        torch.library.opcheck(getattr(ops, name), arguments)
        return getattr(ops, name)(*arguments)

    kept = (hidden, *head, *Targets(ids, None, None), *options, True, use_backend)
    check("linear_row_stats", *kept)  # with a mask, some of what is kept is never written
    targets = Targets(ids, mask, None)
    given = (hidden, *head, *targets, *options)
    logprobs, entropy, row_max, log_sum, _ = check("linear_row_stats", *given, False, use_backend)
    kept_logits = ops.linear_row_stats(*given, True, use_backend)[-1]
    g = torch.where(mask, logprobs, 0.0)
    pull = RowCoefficients(ids, None, row_max, log_sum, entropy, g, g)
    rest = (*pull, mask, None, 0.7, 0.0, False, use_backend)
    check("linear_row_gradient", hidden, kept_logits, into, *head, *some, *rest)
    check("linear_row_gradient", hidden, None, None, *head, *every, *rest)
    tokens = Tokens(case.arguments["old_logprobs"], case.arguments["advantages"], g, None, None)
    loss = (*Rows(ids, None, None, None, None), *tokens, *dk.dcpo().numbers, *options, use_backend)
    check("linear_fused", hidden, into, *head, *some, *loss)
    check("linear_fused", hidden, None, *head, *every, *loss)
    several = torch.stack([ids, (ids + 1) % VOCAB], -1)
    values = check("linear_gather", hidden, *head, several, mask)
    check("linear_gather_gradient", hidden, values, None, *head, *every, several)
    check("linear_gather_gradient", hidden, values, into, *head, *some, several)


def refused(match, error=ValueError, **change):
    case = Case(dk.dcpo(), bias=False)
    base, weight, _ = case.leaves()
    given = {"hidden": base, "weight": weight, **case.arguments, **change}
    with pytest.raises(error, match=match):
        dk.linear_policy_loss(**given)


def test_what_does_not_fit_is_refused_by_name():
    draw = partial(torch.randn, VOCAB)
    refused(r"weight must be \[V, 37\] for hidden", weight=draw(36))
    refused(r"weight must be torch.float32 on cpu", TypeError, weight=draw(37).bfloat16())
    refused(r"bias must be \[37\], got \[36\]", bias=torch.randn(36))
    refused(r"hidden must be packed \[N, D\]", hidden=torch.randn(37))
    refused(
        r"hidden must be bfloat16, float16, float32", TypeError, hidden=torch.ones(24, 37).int()
    )
    refused(r"weight must be a tensor, got list", TypeError, weight=[1.0])
    refused(r"logits_dtype must be torch.float32", TypeError, logits_dtype=torch.float16)
    refused(r"memory_limit=0 must be bytes", memory_limit=0)
    refused(r"logit_scale=-1.0 must be a number > 0", logit_scale=-1.0)
    refused(r"weight_grad must be \[37, 37\]", weight_grad=torch.zeros(37, 36))
    refused(r"weight_grad must be \[37, 37\]", weight_grad=draw(37).half())
    refused(r"outside the vocabulary of 37", IndexError, target_ids=torch.full((24,), 37))
