"""Losses and log-probabilities from hidden states, against those of float64 logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backends import CPU, GPU, SLOW, device_of, on_backends
from problems import OBJECTIVES, moved, pairs, problem
from test_threads_and_memory import peak
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import dcpo_kernels as dk
from dcpo_kernels import ops
from dcpo_kernels.ops import chosen
from dcpo_kernels.ops.records import (
    Head,
    Options,
    RowCoefficients,
    Rows,
    Targets,
    Tokens,
    Wanted,
)

VOCAB = 37
LENGTHS = (6, 0, 1, 9, 8)
KINDS = ["token_loss", "logprobs", "ratio", "clipped", "response_loss", "entropy"]
on_cpu = on_backends("reference", CPU[0])
on_every = on_backends("reference", CPU[0], *SLOW, *GPU)


def rows(n, dtype=torch.float32):
    """memory_limit of so many rows."""
    return n * VOCAB * dtype.itemsize


class Case:
    """A problem whose logits are a product: hidden states in its layout, NaN where no token counts,
    a weight near the identity, and a bias."""

    def __init__(self, objective, *, dtype=torch.float32, bias=True, **options):
        options = {"lengths": LENGTHS, "vocab": VOCAB, "dtype": dtype, **options}
        self.problem = p = problem(objective, **options)
        draw = torch.Generator().manual_seed(1)
        near = torch.eye(VOCAB) + 0.05 * torch.randn(VOCAB, VOCAB, generator=draw)
        self.weight = near.to(dtype)
        self.bias = (0.3 * torch.randn(VOCAB, generator=draw)).to(dtype) if bias else None
        self.arguments = p.arguments

    def leaves(self, dtype=None, device="cpu"):
        given = (self.problem.base, self.weight, self.bias)
        return [
            None if x is None else x.to(device, dtype or x.dtype, copy=True).requires_grad_()
            for x in given
        ]

    def run(self, backend, upstream=1.0, **options):
        """What came out, and the gradients of hidden states, weight and bias."""
        device = device_of(backend)
        base, weight, bias = leaves = self.leaves(device=device)
        arguments = moved({**self.arguments, **options}, device)
        hidden = self.problem.view(base)
        out = dk.linear_policy_loss(hidden, weight, bias=bias, backend=backend, **arguments)
        return self._with_gradients(out, out.loss * upstream, leaves)

    def oracle(self, upstream=1.0, change=lambda x: x, **options):
        base, weight, bias = leaves = self.leaves(torch.float64)
        arguments = {**self.arguments, **options}
        if "old_logits" in arguments:
            arguments["old_logits"] = arguments["old_logits"].double()
        # rows that don't count hold NaN, and 0 * NaN would be in the weight's gradient
        hidden = torch.where(self.problem.counts[..., None], self.problem.view(base), 0.0)
        logits = change(F.linear(hidden, weight, bias))
        out = dk.policy_loss(logits, backend="reference", **arguments)
        return self._with_gradients(out, out.loss * upstream, leaves)

    def _with_gradients(self, out, loss, leaves):
        asked = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(loss, asked)
        base, *others = [x.cpu() for x in gradients]
        out = dk.PolicyLoss(*(x if x is None else x.detach().cpu() for x in out))
        return out, [self.problem.view(base), *others]


def close(found, wanted):
    """float32 rounding apart."""
    (out, gradients), (want, want_gradients) = found, wanted
    for name in ("loss", *KINDS):
        one, two = getattr(out, name), getattr(want, name)
        assert (one is None) == (two is None), name
        if two is not None:
            one, two = one.double(), two.double()
            assert torch.allclose(one, two, rtol=1e-4, atol=2e-5), (name, one, two)
    for one, two in zip(gradients, want_gradients, strict=True):
        assert off(one, two) <= 1e-5


def off(found, wanted):
    """The largest error, relative to the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


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


def by_hand(tokens):
    """A surrogate with an entropy bonus, as a user writes one."""
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    return -(ratio * tokens.advantages) - 0.1 * tokens.entropy


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


# ---- what it costs ------------------------------------------------------------------------------


def products(run):
    """Rows that went through a product with the whole weight, or with its gradient."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    at = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # the first factor
    multiplied = 0
    for event in seen.events():
        if event.name in at:
            (n, k), (_, m) = event.input_shapes[at[event.name] :][:2]
            multiplied += n * k * m
    return multiplied / VOCAB**2


@on_cpu
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_rows_without_a_gradient_cost_no_product(name, use_backend):
    case = Case(OBJECTIVES[name](), lengths=(32, 32), bias=False)
    ones, half = torch.ones(64), torch.tensor([1.0, 0.0]).repeat_interleave(32)
    whole = {"old_logprobs": None, "memory_limit": rows(64), "advantages": ones}

    def cost(**options):
        return products(lambda: case.run(use_backend, **{**whole, **options}))

    assert cost() == 3 * 64
    assert cost(mask=torch.arange(64) % 2 == 0) == 3 * 32
    assert cost(advantages=half, skip_zero_advantage=True) == 3 * 32
    assert cost(advantages=half) == 64 + 2 * 32
    two = {"advantages": half[torch.randperm(64)], "memory_limit": rows(48)}
    if name == "dcpo":
        assert cost(**two) == 64 + 2 * 32
    assert cost(memory_limit=rows(48)) == (3 if name == "dcpo" else 4) * 64
    arguments = {**case.arguments, **whole}
    leaves = [x for x in case.leaves() if x is not None]
    with torch.no_grad():
        assert products(lambda: dk.linear_policy_loss(*leaves, **arguments)) == 64


@on_backends(CPU[0])
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_peak_memory_is_a_chunk_and_what_was_asked_for(name, dtype, parts, use_backend):
    tokens, width, vocab = 256, 256, 40_000  # far more than a block of the weight
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width) / 16
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (tokens,))
    chunk = tokens // parts * vocab * dtype.itemsize
    rest = {"lengths": [128, 128], "memory_limit": chunk, "backend": use_backend}
    rest |= {"objective": OBJECTIVES[name]()}
    kept = {}

    def run():
        out = dk.linear_policy_loss(hidden, weight, ids, None, torch.ones(2), **rest)
        kept["gradients"] = torch.autograd.grad(out.loss, (hidden, weight))

    sums = 4 * weight.numel() if dtype == torch.bfloat16 and parts > 2 else 0
    rule = chunk + sums + hidden.nbytes + weight.nbytes
    assert 0.9 * rule <= peak(run) <= 1.1 * rule


@on_cpu
def test_gradients_nobody_asks_for_cost_no_product(use_backend):
    case = Case(dk.dcpo(), lengths=(64,))
    base, weight, bias = case.leaves()
    arguments = {**case.arguments, "bias": bias.detach(), "backend": use_backend}
    arguments["old_logprobs"] = None  # then no row is clipped

    def run(hidden, weight):
        return lambda: dk.linear_policy_loss(hidden, weight, **arguments).loss.backward()

    assert products(run(base, weight.detach())) == 2 * 64  # a frozen head
    assert weight.grad is None
    assert products(run(base.detach(), weight)) == 2 * 64


# ---- a trainer's ways ---------------------------------------------------------------------------


def step(case, backend, change=lambda *leaves: leaves, **options):
    """The gradients of hidden states and weight of one loss, on what `change` makes of them."""
    base, weight, _ = case.leaves()
    arguments = {**case.arguments, "backend": backend, **options}
    hidden, changed = change(base, weight)
    out = dk.linear_policy_loss(case.problem.view(hidden), changed, **arguments)
    return out, torch.autograd.grad(out.loss, (base, weight))


@on_cpu
def test_the_chunk_changes_rounding_alone(use_backend):
    case = Case(dk.dcpo(entropy_coef=0.1), lengths=(40, 60), bias=False)
    whole, expected = step(case, use_backend, memory_limit=rows(100))
    for most in (1, 7, 33, 64):
        out, gradients = step(case, use_backend, memory_limit=rows(most))
        torch.testing.assert_close(out.token_loss, whole.token_loss, rtol=1e-5, atol=2e-6)
        for one, two in zip(gradients, expected, strict=True):
            assert off(one, two.double()) <= 1e-6


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_pytorch_in_16_bits(dtype, use_backend):
    """Root mean square errors against the float64 gradient. Plain PyTorch has 16-bit logits too, as
    they are, or in float32 after the product. On a CPU a chunk's part of the weight's gradient is
    rounded before it is added, so with several chunks the second can be better by a tenth."""
    case = Case(dk.dcpo(), lengths=(200, 312), dtype=dtype, bias=False)
    given = {key: case.arguments[key] for key in ("lengths", "objective")}
    given |= {"backend": "reference"}
    old, advantages = case.arguments["old_logprobs"], case.arguments["advantages"]
    exact = case.oracle()[1]

    def errors(gradients):
        pairs = zip(gradients, exact, strict=True)
        return [float((x.double() - y).pow(2).mean().sqrt()) for x, y in pairs]

    def plain(change):
        base, weight, _ = case.leaves()
        logprobs = torch.log_softmax(change(F.linear(base, weight)), -1)
        chosen = logprobs.gather(1, case.arguments["target_ids"][:, None])[:, 0]
        loss = dk.policy_loss_from_logprobs(chosen, old, advantages, **given).loss
        return errors(torch.autograd.grad(loss, (base, weight)))

    in_16_bits, in_float32 = plain(lambda x: x), plain(torch.Tensor.float)
    for most, slack in ((512, 1.01), (128, 1.15)):
        for more in ({}, {"logits_dtype": torch.float32}):
            limit = rows(most, dtype) * (3 if more else 1)
            found = errors(step(case, use_backend, memory_limit=limit, **more)[1])
            for ours, theirs, careful in zip(found, in_16_bits, in_float32, strict=True):
                assert ours <= 0.75 * theirs
                assert ours <= slack * careful


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_grad_is_added_to(dtype, use_backend):
    case = Case(dk.dcpo(), dtype=dtype, bias=False)
    _, (of_hidden, of_weight) = step(case, use_backend)
    for into in (torch.ones(VOCAB, VOCAB), torch.ones(VOCAB, VOCAB, dtype=dtype)):
        base, weight, _ = case.leaves()
        given = {**case.arguments, "weight_grad": into, "backend": use_backend}
        for _ in range(2):
            out = dk.linear_policy_loss(base, weight, **given, loss_scale=4.0)
            (4 * out.loss).backward()
        assert weight.grad is None
        torch.testing.assert_close(base.grad, 8 * of_hidden)
        wanted = 1 + 8 * of_weight.float()
        assert off(into, wanted.double()) <= 2 * torch.finfo(dtype).eps
        out = dk.linear_policy_loss(base, weight, **given)
        with pytest.raises(RuntimeError, match=r"upstream gradient is 2\.0 times"):
            (2 * out.loss).backward()


@on_cpu
def test_weight_grad_of_logprobs(use_backend):
    case, into = Case(dk.dcpo(), bias=False), torch.zeros(VOCAB, VOCAB)
    base, weight, _ = case.leaves()
    ids = case.arguments["target_ids"]
    for more in ({}, {"weight_grad": into}, {"kept_ids": ids[:, None], "weight_grad": into}):
        logprobs, _ = dk.linear_selected_logprobs(base, weight, ids, **more, backend=use_backend)
        (2 * logprobs.sum()).backward()
    torch.testing.assert_close(into, weight.grad)  # of one kept id nothing has a gradient


@on_cpu
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_autocast_is_that_of_a_linear_layer(name, use_backend):
    case = Case(OBJECTIVES[name](), bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = step(case, use_backend)
    narrow, wanted = step(case, use_backend, lambda *x: (y.bfloat16() for y in x))
    assert torch.equal(out.loss, narrow.loss)
    for one, two in zip(gradients, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        wide, _ = step(case, use_backend, logits_dtype=torch.float32)
    assert not torch.equal(wide.loss, narrow.loss)


@on_cpu
def test_checkpointing_tied_embeddings_and_an_adapter(use_backend):
    case = Case(dk.dcpo(), bias=False)
    base, weight, _ = case.leaves()
    low, high = (torch.randn(VOCAB, 2) / 9).requires_grad_(), torch.randn(2, VOCAB).requires_grad_()
    inputs = torch.randint(0, VOCAB, base.shape[:-1])
    arguments = {**case.arguments, "backend": use_backend}

    def ours(weight):
        hidden = base + F.embedding(inputs, weight)
        return dk.linear_policy_loss(hidden, weight + low @ high, **arguments).loss

    def plain(weight):
        hidden = base + F.embedding(inputs, weight)
        return dk.policy_loss(F.linear(hidden, weight + low @ high), **arguments).loss

    leaves = (base, weight, low, high)
    wanted = torch.autograd.grad(plain(weight), leaves)
    for loss in (ours(weight), checkpoint(ours, weight, use_reentrant=False)):
        for one, two in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            assert off(one, two) <= 1e-5


@on_cpu
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_all_rows_go_on_while_a_graph_is_captured(name, use_backend, monkeypatch):
    case = Case(OBJECTIVES[name](), layout="padded")
    expected = case.run(use_backend)
    monkeypatch.setattr(chosen, "_capturing", lambda marks: True)
    found = case.run(use_backend)
    for one, two in zip(found[1][1:], expected[1][1:], strict=True):
        assert off(one, two) <= 1e-6
    counts = case.problem.counts
    assert off(found[1][0][counts], expected[1][0][counts]) <= 1e-6
    assert (found[1][0][~counts] == 0).all()


@on_cpu
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no response", "no token"])
@pytest.mark.parametrize("name", ["dcpo", "gspo"])
def test_no_rows(name, lengths, use_backend):
    """As a rank has them whose share of a batch is empty."""
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.ones(VOCAB, 8, requires_grad=True)
    of_tokens, advantages = torch.empty(0), torch.ones(len(lengths))
    given = {"lengths": lengths, "objective": OBJECTIVES[name](), "backend": use_backend}
    ids = of_tokens.long()
    dk.linear_policy_loss(hidden, weight, ids, of_tokens, advantages, **given).loss.backward()
    assert (weight.grad == 0).all() and hidden.grad.shape == (0, 8)
    for targets in (ids, ids.view(0, 1).expand(0, 3)):
        logprobs, _ = dk.linear_selected_logprobs(hidden, weight, targets, backend=use_backend)
        assert logprobs.shape == targets.shape
        logprobs.sum().backward()


def test_backward_runs_once():
    case = Case(dk.dcpo())
    base, weight, _ = case.leaves()
    out = dk.linear_policy_loss(base, weight, **case.arguments)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time through one linear_policy_loss"):
        out.loss.backward()
    logprobs, _ = dk.linear_selected_logprobs(base, weight, case.arguments["target_ids"])
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time through one linear_selected_logprobs"):
        logprobs.sum().backward()


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
