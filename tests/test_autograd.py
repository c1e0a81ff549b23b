"""The losses under autograd: in place, more than one backward, derivatives that there are not."""

from __future__ import annotations

import pytest
import torch
from backends import CPU, EVERYWHERE, device_of, on_backends
from problems import OBJECTIVES, fused_and_sequence, moved, problem

import dcpo_kernels as dk

modes = pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])


def recorded(p, inplace, use_backend, produce=torch.clone):
    """A leaf, logits made from it, and their loss."""
    leaf = p.base.clone().requires_grad_()
    logits = p.view(produce(leaf))
    return leaf, logits, dk.policy_loss(logits, **p.arguments, inplace=inplace, backend=use_backend)


@on_backends(*CPU)
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


@on_backends(*CPU)
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


@on_backends(*CPU)
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


@on_backends(*EVERYWHERE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_grad_the_values_are_the_same(name, use_backend):
    p = problem(OBJECTIVES[name](), layout="sliced", dtype=torch.bfloat16)
    out, _ = p.run(backend=use_backend, with_entropy=True)
    device = device_of(use_backend)
    arguments = moved(p.arguments, device)
    logits = p.base.to(device, copy=True)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            evaluated = dk.policy_loss(
                p.view(logits), **arguments, with_entropy=True, backend=use_backend
            )
        assert not evaluated.loss.requires_grad
        for one, two in zip(out, evaluated, strict=True):
            assert torch.equal(one, two.cpu())
    assert torch.equal(logits.cpu().view(torch.uint8), p.base.view(torch.uint8))
