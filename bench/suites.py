"""What `--suite` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from dcpo_kernels.bench.shapes import MODELS, Case

# (tokens, vocabulary) of training steps that fit the machine.
SHAPES = {
    "cpu": ((256, MODELS["qwen2.5"]),),
    "cuda": ((4096, MODELS["qwen2.5"]), (8192, MODELS["llama3"])),
}
# What the launch tables of the GPU kernels choose by. On a CPU the GPU's suites are a rehearsal.
VOCABS = {
    "cpu": (503,),
    "cuda": (8192, 16384, 32000, 50257, 65536, 102400, 128256, 151936, 202048, 262144),
}
LOGITS = {"cpu": 2**13, "cuda": 2**29}


def loss(tokens: int, vocab: int, device: str, **other: object) -> Case:
    """The loss that the package is about, in the dtype that models are trained in."""
    of = {"operator": "fused", "objective": "dcpo", "dtype": "bf16", **other}
    return Case(tokens=tokens, vocab=vocab, device=device, **of)


def readme(device: str) -> list[Case]:
    """Every operator at each shape, then other dtypes and vocabularies at the first."""
    cases = []
    for tokens, vocab in SHAPES[device]:
        of = partial(loss, tokens, vocab, device)
        cases += [of(), of(zero_advantage=0.5), of(masked=0.2)]
        cases += [of(objective=name) for name in ("grpo", "gspo", "dppo-topk", "dppo-full")]
        cases += [of(operator=name, objective="") for name in ("two_pass", "read")]
    first = cases[0]
    cases.append(replace(first, dtype="fp32"))
    cases += [replace(first, vocab=v) for v in (32000, *MODELS.values()) if v != first.vocab]
    return cases


def gpu(device: str) -> list[Case]:
    """The loss at each shape: what a GPU is asked first."""
    shapes = SHAPES["cuda"] if device == "cuda" else ((16, 503), (24, 1003))
    return [loss(*shape, device) for shape in shapes]


def gpu_sweep(device: str) -> list[Case]:
    """The loss along the vocabulary and along the tokens, in both sizes of a logit; then the other
    operators and what else decides how much of a row is read."""
    logits, vocabs = LOGITS[device], VOCABS[device]
    sweep = [
        loss(logits // (vocab * size // 2), vocab, device, dtype=dtype)
        for dtype, size in (("bf16", 2), ("fp32", 4))
        for vocab in vocabs
    ]
    vocab = 32000 if device == "cuda" else 503
    sweep += [loss(tokens, vocab, device) for tokens in (1024, 4096, 32768) if device == "cuda"]
    of = partial(loss, *gpu(device)[0].shape, device)
    sweep += [of(objective="dcpo-entropy"), of(objective="gspo"), of(zero_advantage=0.5)]
    return [*sweep, *(of(operator=name, objective="") for name in ("two_pass", "read"))]


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "readme": readme,
    "gpu": gpu,
    "gpu-sweep": gpu_sweep,
}
