"""Draws docs/bounds.png and docs/clipping.png with the package itself: python docs/figures.py"""

from pathlib import Path

import matplotlib
import torch

import dcpo_kernels as dk
from dcpo_kernels.decide import clip_bounds
from dcpo_kernels.objective import Objective

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def bounds() -> None:
    """The trust region of the new probability p against the old one q (DCPO figure 4)."""
    q = torch.linspace(1e-3, 1, 2000)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    methods: list[tuple[str, Objective, str]] = [
        ("DCPO 0.16 / 0.2", dk.dcpo(), "tab:red"),
        ("GRPO 0.2", dk.grpo(), "tab:blue"),
        ("DAPO 0.2 / 0.28", dk.dapo(), "tab:green"),
        ("1 ∓ 0.2/√q", dk.inverse_sqrt(), "tab:purple"),
    ]
    for name, objective, color in methods:
        low, high = clip_bounds(objective, q.log())
        axes[0].plot(q, high, color=color, label=name)
        axes[0].plot(q, low, color=color)
        axes[1].plot(q, (high * q).clamp(max=1), color=color, label=name)
        axes[1].plot(q, low * q, color=color)
    axes[0].set(xscale="log", yscale="log", xlabel="old probability q", ylabel="ratio r = p / q")
    axes[0].set(title="bounds on the ratio", yticks=[0.5, 1, 2, 5, 10], ylim=(0.25, 12))
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes[0].minorticks_off()
    axes[1].plot(q, q, color="gray", linewidth=0.8, linestyle="--")
    axes[1].set(xlabel="old probability q", ylabel="new probability p", title="the same in p")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(HERE / "bounds.png", dpi=110)


def clipping() -> None:
    """Token clipping ratio as the policy drifts: logits get noise of a growing size."""
    torch.manual_seed(0)
    tokens, vocab, length = 8192, 512, 64
    old_logits = 4.0 * torch.randn(tokens, vocab)
    ids = torch.distributions.Categorical(logits=old_logits).sample()
    old, _ = dk.selected_logprobs(old_logits, ids)
    top = old_logits.log_softmax(-1).topk(20)
    noise = torch.randn(tokens, vocab)
    advantages = torch.randn(tokens // length)
    methods = {
        "DCPO": dk.dcpo(),
        "GRPO": dk.grpo(),
        "DAPO": dk.dapo(),
        "PPO, dual clip": dk.ppo(),
        "GSPO": dk.gspo(),
        "1 ∓ 0.2/√q": dk.inverse_sqrt(),
        "DPPO binary TV": dk.dppo(),
        "DPPO binary KL": dk.dppo("binary_kl"),
        "DPPO top-20 TV": dk.dppo("topk_tv"),
        "CISPO (cut, not stopped)": dk.cispo(),
    }
    drifts = torch.logspace(-2, 0.5, 24)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, objective in methods.items():
        ratios = []
        for drift in drifts:
            extra = {}
            if objective.needs_topk:
                extra = {"topk_ids": top.indices, "topk_logprobs": top.values}
            out = dk.policy_loss(
                old_logits + drift * noise,
                ids,
                old,
                advantages,
                lengths=[length] * (tokens // length),
                objective=objective,
                **extra,
            )
            ratios.append(float(dk.token_clipping_ratio(out)))
        axis.plot(drifts, ratios, label=name, marker=".", markersize=3)
    axis.set(xscale="log", xlabel="drift: standard deviation of the noise on the logits")
    axis.set(ylabel="token clipping ratio", title="tokens stopped by each method")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(HERE / "clipping.png", dpi=110)


if __name__ == "__main__":
    bounds()
    clipping()
