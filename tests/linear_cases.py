"""Hidden states, a weight and what float64 says of their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from backends import CPU, GPU, SLOW, device_of, on_backends
from problems import moved, problem

import dcpo_kernels as dk

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


def by_hand(tokens):
    """A surrogate with an entropy bonus, as a user writes one."""
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    return -(ratio * tokens.advantages) - 0.1 * tokens.entropy
