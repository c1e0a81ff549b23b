"""Random batches for the losses, in every layout, and what float64 says of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from backends import device_of
from torch import Tensor

import dcpo_kernels as dk

PENALTY: Any = {"penalty_coef": 0.8, "limit_low": 0.02, "limit_high": 0.03}
# Trust regions narrow enough that each of them stops some tokens of a batch.
OBJECTIVES: dict[str, Callable[..., dk.Objective]] = {
    "dcpo": partial(dk.dcpo, 0.02, 0.03, 1.6),
    "grpo": dk.grpo,
    "dapo": dk.dapo,
    "ppo": partial(dk.ppo, 0.2, 1.4),
    "gspo": partial(dk.gspo, 0.05, 0.08),
    "inverse_sqrt": partial(dk.inverse_sqrt, 0.02),
    "sapo": dk.sapo,
    "cispo": partial(dk.cispo, 1.3, 0.8),
    "icepop": partial(dk.icepop, 0.8, 1.25),
    # A test that adds a KL term has another estimator of it with each of these.
    "ipo": partial(dk.ipo, 0.03, 0.1, kl_estimator="k1"),
    "up": partial(dk.up, 0.2, 1.4, kl_estimator="abs"),
    "spo": partial(dk.spo, 0.3, kl_estimator="k2"),
    "drpo": partial(dk.drpo, 0.1, old_kl_coef=0.2, old_kl_estimator="k3_unbiased"),
    "topr": partial(dk.topr, old_kl_coef=0.1, old_kl_estimator="abs"),
    "gmpo": partial(dk.gmpo, 0.25, 0.35),
    "vespo": dk.vespo,
    "reinforce": partial(dk.reinforce, kl_estimator="k3_unbiased"),
    "dppo-binary_tv": partial(dk.dppo, "binary_tv", 0.03),
    "dppo-binary_kl": partial(dk.dppo, "binary_kl", 0.01),
    "dppo-topk_tv": partial(dk.dppo, "topk_tv", 0.1),
    "dppo-topk_kl": partial(dk.dppo, "topk_kl", 0.03),
    "dppo-tv": partial(dk.dppo, "tv", 0.15),
    "dppo-kl": partial(dk.dppo, "kl", 0.1),
    "penalty-binary_tv": partial(dk.dppo, "binary_tv", (0.02, 0.04), penalty_coef=0.8),
    "penalty-binary_kl": partial(dk.dcpo, **PENALTY, divergence="binary_kl"),
    "penalty-topk_tv": partial(dk.sapo, **PENALTY, divergence="topk_tv"),
    "penalty-topk_kl": partial(dk.dppo, "topk_kl", (0.02, 0.04), penalty_coef=0.8),
    "penalty-tv": partial(dk.ppo, **PENALTY, divergence="tv"),
    "penalty-kl": partial(dk.dppo, "kl", (0.1, 0.15), penalty_coef=0.8),
}
CODES = {"dcpo": {0, 1, 2, 3}, "ppo": {0, 1, 2, 3}, "sapo": {0}}  # of `clipped`
CODES |= {"cispo": {0, 2, 3}, "icepop": {0, 4}, "ipo": {0, 4}, "up": {0, 2, 3}, "topr": {0, 3}}
CODES |= {"spo": {0}, "drpo": {0}, "reinforce": {0}, "vespo": {0}, "gmpo": {0, 1, 2}}
CODES |= {name: {0, 1, 2} for name in ("grpo", "dapo", "gspo", "inverse_sqrt")}
CODES |= {name: {0, 4} for name in OBJECTIVES if name.startswith("dppo")}
CODES |= {name: {0} for name in OBJECTIVES if name.startswith("penalty")}
CODES |= {"penalty-binary_kl": {0, 1, 2}, "penalty-tv": {0, 1, 2}}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative.
ROUNDING = {torch.float64: 0.0, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
LAYOUTS = ("packed", "row-stride", "padded", "sliced", "time-major")
PER_TOKEN = ("token_loss", "logprobs", "entropy", "ratio", "clipped")


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: x.to(device) if torch.is_tensor(x) else x for key, x in arguments.items()}


@dataclass
class Problem:
    """base holds the memory, view(base) are the logits, arguments is everything else that
    policy_loss wants."""

    base: Tensor
    view: Callable[[Tensor], Tensor]
    arguments: dict[str, Any]

    @property
    def logits(self) -> Tensor:
        return self.view(self.base)

    @property
    def counts(self) -> Tensor:
        """[N] or [B, T]: the tokens that count."""
        mask = self.arguments.get("mask")
        rows = self.logits.shape[:-1]
        return torch.ones(rows, dtype=torch.bool) if mask is None else mask != 0

    def run(
        self, upstream: Callable[[Tensor], Tensor] | None = None, **options: Any
    ) -> tuple[dk.PolicyLoss, Tensor]:
        """The loss and the gradient of upstream(loss) in the logits, in memory of its own. What
        runs on a GPU comes back from it."""
        arguments = {**self.arguments, **options}
        dtype = arguments.pop("dtype", self.base.dtype)
        if dtype == torch.float64 and "old_logits" in arguments:
            arguments["old_logits"] = arguments["old_logits"].double()
        device = device_of(arguments.get("backend", "auto"))
        arguments = moved(arguments, device)
        leaf = self.base.detach().to(device, dtype, copy=True).requires_grad_()
        # in place wants logits that are no leaf, nor a view of one
        logits = self.view(leaf.clone() if arguments.get("inplace") else leaf)
        out = dk.policy_loss(logits, **arguments)
        loss = out.loss if upstream is None else upstream(out.loss)
        (gradient,) = torch.autograd.grad(loss, leaf)
        out = dk.PolicyLoss(*(x if x is None else x.cpu() for x in out))
        return out, self.view(gradient.cpu())

    def selected(
        self, upstream: Callable[..., Tensor], backend: str, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """logprobs, entropy and the gradient of upstream(logprobs, entropy), the same way."""
        device, keys = device_of(backend), ("target_ids", "temperature", "mask")
        given = {key: self.arguments[key] for key in keys if key in self.arguments}
        given = moved({**given, **options}, device)
        leaf = self.base.to(device, copy=True).requires_grad_()
        logits = self.view(leaf.clone() if options.get("inplace") else leaf)
        logprobs, entropy = dk.selected_logprobs(logits, **given, backend=backend)
        (gradient,) = torch.autograd.grad(upstream(logprobs, entropy), leaf)
        entropy = None if entropy is None else entropy.detach().cpu()
        return logprobs.detach().cpu(), entropy, self.view(gradient.cpu())

    def oracle(self, **options: Any) -> tuple[dk.PolicyLoss, Tensor]:
        return self.run(dtype=torch.float64, backend="reference", inplace=False, **options)


def spread(values: Tensor, mask: Tensor | None) -> Tensor:
    """[N, ...] as [B, T, ...]: NaN, or the id -100, where no token counts."""
    if mask is None:
        return values
    nothing = torch.nan if values.is_floating_point() else -100
    out = torch.full((*mask.shape, *values.shape[1:]), nothing, dtype=values.dtype)
    out[mask] = values
    return out


def per_token(x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What is given per response, for each of its tokens."""
    if arguments.get("mask") is None:
        return x.repeat_interleave(arguments["lengths"])
    return x[:, None].expand(arguments["mask"].shape)


def lay_out(rows: Tensor, layout: str, mask: Tensor | None) -> tuple[Tensor, Callable]:
    """Logits [N, V], one row a token that counts, as memory and a view of it; NaN wherever no token
    counts."""
    vocab = rows.shape[1]
    if layout == "packed":
        return rows, lambda x: x
    if layout == "row-stride":  # odd strides: rows begin off every boundary
        base = torch.full((len(rows), vocab + 3), torch.nan, dtype=rows.dtype)
        base[:, :vocab] = rows
        return base, lambda x: x[:, :vocab]
    assert mask is not None
    batch, time = mask.shape
    if layout == "time-major":
        base = torch.full((time, batch, vocab), torch.nan, dtype=rows.dtype)
        base.transpose(0, 1)[mask] = rows
        return base, lambda x: x.transpose(0, 1)
    extra = int(layout == "sliced")  # logits[:, :-1] predict ids[:, 1:]
    base = torch.full((batch, time + extra, vocab), torch.nan, dtype=rows.dtype)
    base[:, :time][mask] = rows
    return base, lambda x: x[:, :time]


def problem(
    objective: dk.Objective,
    *,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
    vocab: int = 37,
    lengths: tuple[int, ...] = (6, 0, 1, 9, 8),
    temperature: float | str = 1.0,
    advantages: str = "token",
    importance: str | None = None,
    on_policy: bool = False,
    old_dtype: torch.dtype | None = None,
    drift: float = 0.7,
    seed: int = 0,
) -> Problem:
    """A policy some way off the one that sampled. Temperature, advantages and importance weights:
    one per "token" or "response". Tokens that don't count hold NaN and the id -100. A new argument
    of policy_loss has its place here, and a factor in test_losses.SETTINGS."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw)
    tokens, responses, each = sum(lengths), len(lengths), torch.tensor(lengths, dtype=torch.int64)
    rows = (2 * normal(tokens, vocab)).to(dtype)
    old_rows = (rows + drift * normal(tokens, vocab)).to(old_dtype or dtype)
    token_values: dict[str, Any] = {}
    response_values: dict[str, Any] = {}

    def put(name: str, per: str, values: Callable[[int], Tensor]) -> None:
        if per == "token":
            token_values[name] = values(tokens)
        else:
            response_values[name] = values(responses)

    options: dict[str, Any] = {"temperature": temperature}
    row_temperature: Any = temperature
    if isinstance(temperature, str):
        apart = torch.Generator().manual_seed(seed + 1)
        put("temperature", temperature, lambda n: 0.5 + torch.rand(n, generator=apart))
        row_temperature = token_values.get("temperature")
        if row_temperature is None:
            row_temperature = response_values["temperature"].repeat_interleave(each)
        row_temperature = row_temperature[:, None]
        options = {}
    old = torch.log_softmax(old_rows.double() / row_temperature, -1)
    ids = torch.multinomial(old.exp(), 1, generator=draw)[:, 0] if tokens else torch.empty(0).long()
    old_logprobs = old.gather(1, ids[:, None])[:, 0].float()
    token_values |= {"target_ids": ids, "old_logprobs": old_logprobs}
    if objective.kl_coef:
        token_values["ref_logprobs"] = old_logprobs + 0.3 * normal(tokens)
    if objective.needs_topk:
        top = old.topk(min(4, vocab))
        token_values |= {"topk_ids": top.indices, "topk_logprobs": top.values.float()}
    if objective.needs_old_logits:
        token_values["old_logits"] = old_rows
    put("advantages", advantages, normal)
    if importance is not None:
        put("importance_weights", importance, lambda n: normal(n).exp())

    mask = None
    grouping: dict[str, Any] = {"lengths": each}
    if layout not in ("packed", "row-stride"):
        time = max(lengths, default=0) + 2
        order = torch.rand(responses, time, generator=draw).argsort(1)  # with holes in between
        mask = order < each[:, None]
        grouping = {"mask": mask}
    token_values = {name: spread(values, mask) for name, values in token_values.items()}
    if on_policy:
        token_values["old_logprobs"] = None
    base, view = lay_out(rows, layout, mask)
    options |= {"objective": objective, "max_length": max(lengths, default=0) or 1}
    return Problem(base, view, {**token_values, **response_values, **grouping, **options})


def pull(p: Problem, expected: dk.PolicyLoss) -> Tensor:
    """[N] or [B, T]: weight (|g| + |h| (1 + H)) / T, what multiplies the probabilities in a row's
    gradient before anything cancels. Its rounding is what a gradient entry may be off by."""
    arguments = p.arguments
    objective = arguments["objective"]
    mask = arguments.get("mask")

    def value(name):
        x = arguments[name]
        if not torch.is_tensor(x):
            return x
        x = x if x.shape == expected.logprobs.shape else per_token(x, arguments)
        return x.nan_to_num(1.0)

    weight = dk.token_weights(
        arguments["lengths"] if mask is None else mask,
        objective.aggregation,
        max_length=arguments["max_length"],
    )

    def of_response(x):
        """Its mean over each response's tokens, and what is there of it per token."""
        if mask is not None:
            return x + (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.cat(
            [
                part + part.sum() / max(len(part), 1)
                for part in x.split(arguments["lengths"].tolist())
            ]
        )

    ratio = expected.ratio
    if objective.surrogate == "reinforce-clip" or objective.floor_high:
        ratio = ratio.clamp(min=max(objective.floor_high, 1))  # some weigh as much, whatever it is
    g = value("advantages").abs() * ratio
    if "quadratic" in objective.surrogate:
        g = g * (1 + (1 + ratio) / objective.eps_high)
    if "importance_weights" in arguments:
        g = g * value("importance_weights")
    if objective.surrogate == "gamma":
        g = 10 * value("advantages").abs()  # its weight is steep
    if objective.ratio_level == "sequence":
        g = of_response(g)
    for kl, anchor in (("kl", "ref_logprobs"), ("old_kl", "old_logprobs")):
        if not getattr(objective, f"{kl}_coef"):
            continue
        anchored = expected.logprobs if arguments[anchor] is None else value(anchor)
        d = (anchored - expected.logprobs).clamp(-20, 20)
        estimator = getattr(objective, f"{kl}_estimator")
        slope = 1 + d.exp() + (0 if estimator == "k3" else d.abs())
        factor = expected.ratio if estimator == "k3_unbiased" else 1
        g = g + getattr(objective, f"{kl}_coef") * slope * factor
    if objective.penalty_coef:
        not_p = -torch.expm1(expected.logprobs)  # a penalty pulls with up to 1 + p / (1 - p)
        g = g + objective.penalty_coef * (1 + 1 / not_p.clamp(min=1e-3))
    entropy = torch.zeros(()) if expected.entropy is None else expected.entropy
    return weight * (g + abs(objective.entropy_coef) * (1 + entropy)) / value("temperature")


def assert_matches(
    p: Problem,
    found: tuple[dk.PolicyLoss, Tensor],
    expected: tuple[dk.PolicyLoss, Tensor],
    scale: float = 1.0,
) -> None:
    """Values within float32 rounding of the oracle's; the gradient scaled, and rounded once to its
    dtype (twice where an upstream gradient came after)."""
    (out, gradient), (want, want_gradient) = found, expected
    torch.testing.assert_close(out.logprobs.double(), want.logprobs, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(out.ratio.double(), want.ratio, rtol=1e-5, atol=0)
    assert (out.entropy is None) == (want.entropy is None)
    if want.entropy is not None:
        torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=2e-6, atol=4e-6)
    assert torch.equal(out.clipped, want.clipped)
    assert torch.equal(out.mask, want.mask)
    torch.testing.assert_close(out.token_loss.double(), want.token_loss, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(out.response_loss.double(), want.response_loss, rtol=2e-5, atol=1e-5)
    coefficient = pull(p, want)
    slack = 1e-5 * float(coefficient.sum() + want.token_loss.abs().max())
    assert abs(float(out.loss.detach()) - float(want.loss.detach())) <= slack

    rounding = ROUNDING[gradient.dtype] * (1 if scale == 1 else 2.1)
    smallest = 2.0**-24 if gradient.dtype == torch.float16 else 0.0
    want_gradient = scale * want_gradient
    error = (gradient.double() - want_gradient).abs()
    slack = rounding * want_gradient.abs() + 5e-6 * abs(scale) * coefficient[..., None] + smallest
    assert (error <= slack).all(), f"gradient off by up to {float((error / slack).max())} slacks"


def assert_same_bits(
    found: tuple[dk.PolicyLoss, Tensor], expected: tuple[dk.PolicyLoss, Tensor]
) -> None:
    for one, two in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def pairs(**factors: tuple) -> list[dict[str, Any]]:
    """Few settings in which every two values of every two factors meet (greedy)."""
    draw = random.Random(0)
    items = {name: [(name, i) for i in range(len(values))] for name, values in factors.items()}
    open_pairs = {
        frozenset(pair)
        for a, b in itertools.combinations(items.values(), 2)
        for pair in itertools.product(a, b)
    }
    cases = []
    while open_pairs:
        case = sorted(min(open_pairs, key=sorted))
        for name in draw.sample(list(items), len(items)):
            if name not in dict(case):
                candidates = draw.sample(items[name], len(items[name]))  # ties go to any
                gains = [sum({c, item} in open_pairs for item in case) for c in candidates]
                case.append(candidates[gains.index(max(gains))])
        open_pairs -= set(map(frozenset, itertools.combinations(case, 2)))
        chosen = dict(case)
        cases.append({name: values[chosen[name]] for name, values in factors.items()})
    return cases


def label(case: dict[str, Any]) -> str:
    """The id of such a setting."""
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


fused_and_sequence = pytest.mark.parametrize("name", ["dcpo", "gspo"])
