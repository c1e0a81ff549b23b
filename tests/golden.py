"""The golden values: computed outside the project, in 50 digits and in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import ROUNDING, Problem, lay_out, spread
from torch import Tensor

import dcpo_kernels as dk

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> Any:
    """A golden file, which must be there and hold something."""
    data = json.loads((GOLDEN / name).read_text())
    assert data, f"{name} is empty"
    return data


def preset(name: str, params: dict[str, Any], **parts: Any) -> dk.Objective:
    """The objective of a golden case, whose params are named as in the papers, not as in our
    signatures."""
    p = dict(params)
    if name == "grpo":
        assert p["eps_low"] == p["eps_high"]
        return dk.grpo(p["eps_low"], **parts)
    if name == "ppo":
        return dk.ppo(p["eps_low"], p["dual_clip"], **parts)
    if name == "dppo":
        limits = (p["limit_low"], p["limit_high"])
        return dk.dppo(p["divergence"], limits, p["ratio_cap"], **parts)
    return getattr(dk, name)(**p, **parts)


TOKENS = load("token.json")["cases"]
TOKENS += load("token2.json")["cases"]
KL_CASES = load("token2.json")["kl_cases"]  # say nothing of the ratio and of what clipped it
GROUPS: dict[str, list] = {}  # token cases by objective, so that each group is one batch
for _case in TOKENS + KL_CASES:
    _name = f"{_case['preset']} {_case['params']} kl={_case.get('kl_coef', 0.0)}"
    _name += f" {_case['kl_estimator']} to {_case['kl_to']}" if "kl_to" in _case else ""
    GROUPS.setdefault(_name, []).append(_case)

BATCHES = {entry["file"].removesuffix(".npz"): entry for entry in load("batches.json")}
FLOATS = ("old_logprobs", "ref_logprobs", "advantages")
PER_TOKEN = (*FLOATS, "target_ids", "topk_ids", "topk_logprobs", "old_logits")


def arrays(entry: dict[str, Any]) -> dict[str, Tensor]:
    """What a batch's file holds, old_logits no longer divided by the temperature."""
    file = np.load(GOLDEN / entry["file"])
    a = {key: torch.as_tensor(file[key]) for key in file.files}
    assert a["logits"].shape == (entry["tokens"], entry["vocab"])
    if "old_logits" in a:
        a["old_logits"] = a["old_logits"] * entry["temperature"]
    return a


def objective_of(entry: dict[str, Any]) -> dk.Objective:
    parts = {key: entry[key] for key in ("aggregation", "kl_coef", "entropy_coef")}
    objective = preset(entry["preset"], entry["params"], **parts)
    assert objective.ratio_level == entry["ratio_level"]
    return objective


def batch(entry: dict[str, Any], a: dict[str, Tensor], dtype: torch.dtype, layout: str) -> Problem:
    """padded: the responses spread over [B, T] with garbage between them."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    mask, grouping = None, {"lengths": a["lengths"]}
    if layout == "padded":
        mask = torch.arange(int(a["lengths"].max()) + 1) < a["lengths"][:, None]
        grouping = {"mask": mask}
    cast = {**dict.fromkeys(FLOATS, floats), "old_logits": dtype}
    rows = {key: a[key].to(cast.get(key, a[key].dtype)) for key in PER_TOKEN if key in a}
    base, view = lay_out(a["logits"].to(dtype), layout, mask)
    arguments = {
        **{key: spread(x, mask) for key, x in rows.items()},
        **grouping,
        "objective": objective_of(entry),
        "temperature": entry["temperature"],
        "max_length": int(a["lengths"].max()),
    }
    return Problem(base, view, arguments)


def check(
    entry: dict[str, Any], a: dict[str, Tensor], dtype: torch.dtype, layout: str, backend: str
) -> None:
    """One batch on one backend: every result, and the gradient rounded once to its dtype."""
    if dtype == torch.float16 and not torch.equal(a["logits"].half().float(), a["logits"]):
        dtype = torch.float32  # a logit beyond what float16 holds
    p = batch(entry, a, dtype, layout)
    out, gradient = p.run(backend=backend, with_entropy=True)
    assert (gradient[~p.counts] == 0).all()
    gradient = gradient[p.counts].double()
    logprobs, entropy, token_loss, ratio = (
        getattr(out, key)[p.counts].double()
        for key in ("logprobs", "entropy", "token_loss", "ratio")
    )
    torch.testing.assert_close(logprobs, a["logprobs"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy, a["entropy"], rtol=2e-6, atol=4e-6)
    scale = 1 + a["token_loss"].abs()
    assert ((token_loss - a["token_loss"]).abs() <= 1e-5 * scale).all()
    assert abs(float(out.loss.detach()) - float(a["loss"])) <= 1e-5 * float(
        (a["weights"] * scale).sum()
    )
    assert torch.equal(out.clipped[p.counts], a["clipped"])
    # Rounding of the dtype on each entry (the logits are exact in all of them), and float32
    # rounding on the coefficients that multiply the row's probabilities: g (1 - p) is small where
    # p is near 1, its error is that of g.
    pull = entry["kl_coef"] * torch.expm1(a["ref_logprobs"] - a["logprobs"]).abs()
    g = a["advantages"].abs() * ratio + pull
    h = entry["entropy_coef"] * (1 + a["entropy"])
    coefficient = (a["weights"] * (g + h) / entry["temperature"])[:, None]
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    slack = ROUNDING[dtype] * a["dlogits"].abs() + 5e-6 * coefficient + smallest
    assert ((gradient - a["dlogits"]).abs() <= slack).all()
    index = torch.repeat_interleave(torch.arange(len(a["lengths"])), a["lengths"])
    sums = torch.zeros(len(a["lengths"]), dtype=torch.float64).index_add(0, index, a["token_loss"])
    means = sums / a["lengths"].clamp(min=1)
    torch.testing.assert_close(out.response_loss.double(), means, rtol=1e-5, atol=1e-5)
