"""Rows of logits given one by one, and what float64 says of them."""

from __future__ import annotations

import torch
from problems import ROUNDING

import dcpo_kernels as dk

INF, NAN = float("inf"), float("nan")


def run(logits, ids, old=None, A=None, **options):
    """policy_loss of single-token responses and the gradient, one logit row each."""
    rows = len(logits)
    leaf = logits.detach().requires_grad_()
    old = torch.full((rows,), -1.0) if old is None else torch.as_tensor(old)
    A = torch.ones(rows) if A is None else torch.as_tensor(A)
    options = {"objective": dk.grpo(), "lengths": [1] * rows, **options}
    out = dk.policy_loss(leaf, torch.as_tensor(ids), old, A, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def exact(logits, ids, temperature=1.0):
    """logprobs, entropy [N] and log p [N, V] in float64."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p.nan_to_num(neginf=0.0), 0.0).sum(-1)
    return log_p.gather(1, torch.as_tensor(ids)[:, None])[:, 0], entropy, log_p


def assert_selected(logits, ids, backend, temperature=1.0, note=None):
    """logprobs, entropy and the gradient of 2 logp - 3 H against float64."""
    ids = torch.as_tensor(ids)
    leaf = logits.clone().requires_grad_()
    options = {"temperature": temperature, "with_entropy": True, "backend": backend}
    logprobs, entropy = dk.selected_logprobs(leaf, ids, **options)
    (gradient,) = torch.autograd.grad((2 * logprobs - 3 * entropy).sum(), leaf)
    want, want_entropy, log_p = exact(logits, ids, temperature)
    close = {"rtol": 2e-6, "atol": 4e-6, "msg": lambda text: f"{note}: {text}"}
    torch.testing.assert_close(logprobs.double(), want, **close)
    torch.testing.assert_close(entropy.double(), want_entropy, **close)
    p = log_p.exp()
    onehot = torch.nn.functional.one_hot(ids, logits.shape[1])
    pull = p * (log_p.nan_to_num(neginf=0.0) + want_entropy[:, None])
    expected = (2 * (onehot - p) + 3 * pull) / temperature
    slack = ROUNDING[logits.dtype] * expected.abs() + 2e-5 * (1 + want_entropy[:, None])
    assert ((gradient.double() - expected).abs() <= slack).all(), note
    assert (gradient[logits == -INF].double() - expected[logits == -INF] == 0).all(), note
