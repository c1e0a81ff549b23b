"""Losses from hidden states as trainers use them: chunks, 16 bits, autocast, adapters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_cases import VOCAB, Case, off, on_cpu, rows
from problems import OBJECTIVES
from torch.utils.checkpoint import checkpoint

import dcpo_kernels as dk
from dcpo_kernels.ops import chosen


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
