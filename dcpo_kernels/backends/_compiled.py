"""What the compiled module's functions take, on a CPU and on a GPU: the operators' records by name,
tensors as addresses."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcpo_kernels import objective
from dcpo_kernels.backends.layout import row_count, row_strides

if TYPE_CHECKING:
    from dcpo_kernels.objective import Numbers
    from dcpo_kernels.ops.records import (
        Coefficients,
        Decisions,
        Grouping,
        Options,
        RatioGroups,
        Read,
        Responses,
        Results,
        RowCoefficients,
        Rows,
        RowStats,
        Targets,
        Tokens,
        Totals,
        Written,
    )


def _load() -> Any:
    """The module, if it knows the codes by the same names."""
    module = importlib.import_module("dcpo_kernels._C")
    for names in (
        "SURROGATES",
        "DIVERGENCES",
        "KL_ESTIMATORS",
        "ROLLOUT_MODES",
        "CLIPPED",
        "AGGREGATIONS",
    ):
        found, wanted = getattr(module, names, None), getattr(objective, names)
        if found != wanted:
            raise ImportError(f"it is of another version: its {names} are {found}, not {wanted}")
    return module


missing = ""  # why there is no module
C: Any = None
try:
    C = _load()
except ImportError as error:
    built = sorted(file.name for file in Path(__file__).parents[1].glob("_C*.so"))
    if not isinstance(error, ModuleNotFoundError):
        missing = f"the compiled module can't be loaded ({error}); `pip install .` builds it anew"
    elif built:
        missing = (
            f"the compiled module is for another Python ({', '.join(built)}); `pip install .` "
            "builds it for this one"
        )
    else:
        missing = "the compiled module was never built; `pip install .` builds it"

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

if C is not None and os.environ.get("DCPO_KERNELS_CPU_ISA"):
    C.cpu_use_isa(os.environ["DCPO_KERNELS_CPU_ISA"])


def _address(x: Tensor | None) -> int:
    return x.data_ptr() if x is not None and x.numel() else 0


def view(x: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 1, 0, 0) if x is None else (x.data_ptr(), *row_strides(x))


def _named(*records: Any) -> dict[str, Any]:
    """Fields by name, tensors as addresses: None or 0 where there is none."""
    return {
        name: x.data_ptr() if isinstance(x, Tensor) else x
        for record in records
        for name, x in zip(record._fields, record, strict=True)
    }


@functools.lru_cache(maxsize=64)
def _objective(numbers: Numbers) -> Any:
    return C.Objective(**numbers._asdict())


def _shape(logits: Tensor, temperature: float, softcap: float) -> dict[str, Any]:
    return {
        "rows": row_count(logits),
        "vocab": logits.shape[-1],
        "dtype": DTYPES[logits.dtype],
        "temperature": temperature,
        "softcap": softcap,
        "logits": view(logits),
    }


def fused_arguments(
    logits: Tensor,
    gradient: Tensor | None,  # like logits, or logits itself; None: read and decide only
    rows: Rows,
    tokens: Tokens,
    numbers: Numbers,
    options: Options,
    results: Results,
    written: Written,
) -> dict[str, Any]:
    old_logits = rows.old_logits
    return {
        **_shape(logits, options.temperature, options.softcap),
        **_named(rows, tokens, results, written),
        "gradient": view(gradient),
        "k": 0 if rows.topk_ids is None else rows.topk_ids.shape[-1],
        "old_logits": view(old_logits),
        "old_dtype": DTYPES[logits.dtype if old_logits is None else old_logits.dtype],
        "objective": _objective(numbers),
    }


def row_stats_arguments(
    logits: Tensor, targets: Targets, options: Options, stats: RowStats
) -> dict[str, Any]:
    return {
        **_shape(logits, options.temperature, options.softcap),
        **_named(targets, stats),
        "k": targets.target_ids.numel() // row_count(logits),
    }


def row_gradient_arguments(
    logits: Tensor,
    gradient: Tensor,  # like logits, or logits itself
    coefficients: RowCoefficients,
    factor: Tensor | None,
    temperature: float,
    softcap: float,
) -> dict[str, Any]:
    return {
        **_shape(logits, temperature, softcap),
        **_named(coefficients),
        "k": coefficients.target_ids.numel() // row_count(logits),
        "gradient": view(gradient),
        "factor": _address(factor),
    }


def token_weights_arguments(
    grouping: Grouping, values: list[Tensor], responses: Responses, spread: list[Tensor]
) -> dict[str, Any]:
    return {
        "rows": responses.mask.numel(),
        "count": responses.lengths.numel(),
        "grouping": _named(grouping),
        "responses": _named(responses),
        "values": [_address(x) for x in values],
        "spread": [_address(x) for x in spread],
    }


def decide_arguments(
    read: Read,
    tokens: Tokens,
    numbers: Numbers,
    groups: RatioGroups,
    decisions: Decisions,
    coefficients: Coefficients,
) -> dict[str, Any]:
    return {
        "rows": read.logprobs.numel(),
        "count": groups.lengths.numel(),
        **_named(read, tokens, groups, decisions, coefficients),
        "objective": _objective(numbers),
    }


def finish_arguments(results: Results, responses: Responses, totals: Totals) -> dict[str, Any]:
    return {
        "rows": results.token_loss.numel(),
        "count": responses.lengths.numel(),
        **_named(results, responses, totals),
    }


def multiply_arguments(x: Tensor, factor: Tensor) -> dict[str, Any]:
    return {
        "rows": row_count(x),
        "vocab": x.shape[-1],
        "dtype": DTYPES[x.dtype],
        "x": view(x),
        "factor": factor.data_ptr(),
    }
