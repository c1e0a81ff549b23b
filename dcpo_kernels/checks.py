"""What the door asks of a single argument: its kind, its shape, its values, and the error where one
does not fit. Each brings it to what the operators take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcpo_kernels import backends
from dcpo_kernels.objective import MAX_K, Objective
from dcpo_kernels.ops.library import check_places

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IDS = (torch.int64, torch.int32)
MAX_K_READ = 1024  # ids per row of selected_logprobs; MAX_K where a gradient is to come
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGERS += (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS)
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_transforms(name: str, logits: Tensor) -> None:
    """The operators are opaque to torch.func and to forward mode, which would see a constant."""
    if torch.compiler.is_compiling():
        return
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} has first derivatives in reverse mode, by backward() or torch.autograd.grad: "
            "forward mode and torch.func's transforms (grad, jvp, hessian, vmap) can't go through"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_logits(name: str, logits: Tensor, backend: str) -> str:
    """The backend that will serve these logits."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if placements := getattr(logits, "placements", None):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {placements}: "
            "pass logits.full_tensor(), or logits.to_local() where each rank has whole rows"
        )
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{name} must be packed [N, V] or padded [B, T, V], got shape {list(logits.shape)}"
        )
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} has an empty vocabulary: shape {list(logits.shape)}")
    backend = backends.choose(backend, logits.device.type)
    check_dtype(name, logits, backend)
    if backend != "reference" and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous along the vocabulary, got strides {list(logits.stride())}; "
            f"rows may be strided"
        )
    return backend


def check_dtype(name: str, x: Tensor, backend: str) -> None:
    dtypes = (*LOGITS_DTYPES, torch.float64) if backend == "reference" else LOGITS_DTYPES
    if x.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {_names(dtypes)} for backend={backend!r}, got {_names([x.dtype])}"
        )


def check_in_place(logits: Tensor) -> None:
    if (
        torch.compiler.is_compiling()
    ):  # the operator looks at its places, where no guard comes of it
        return
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "inplace=True would overwrite logits that are a leaf of the graph, or a view of one; "
            "pass inplace=False"
        )
    check_places(logits)


def _check_tensor(name: str, x: object, shape: Sequence[object]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {list(shape)}, got {type(x).__name__}")


def check_kind(name: str, x: Tensor, logits: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_names([x.dtype])}")
    if x.device != logits.device:
        raise ValueError(f"{name} is on {x.device}, logits are on {logits.device}")


def rows_of(
    name: str, x: Tensor, logits: Tensor, dtypes: Sequence[torch.dtype], to: torch.dtype
) -> Tensor:
    """One value per token, [N] or [B, T] as the logits have them, contiguous and of the kernels'
    dtype."""
    tokens = list(logits.shape[:-1])
    _check_tensor(name, x, tokens)
    if list(x.shape) != tokens:
        raise ValueError(
            f"{name} must have one value per token, shape {tokens}, got {list(x.shape)}"
        )
    check_kind(name, x, logits, dtypes)
    return x.to(to).contiguous()


def floats(name: str, x: Tensor, logits: Tensor) -> Tensor:
    return rows_of(name, x, logits, FLOATS, torch.float32)


def values_of(name: str, x: Tensor, logits: Tensor, backend: str) -> Tensor:
    """The same of what may carry a gradient, in the dtype that the backend computes in."""
    in_double = x.dtype == torch.float64 and backend == "reference"
    return rows_of(name, x, logits, FLOATS, torch.float64 if in_double else torch.float32)


def mask_of(mask: Tensor, logits: Tensor) -> Tensor:
    tokens = list(logits.shape[:-1])
    _check_tensor("mask", mask, tokens)
    if list(mask.shape) != tokens:
        raise ValueError(f"mask must have shape {tokens}, got {list(mask.shape)}")
    check_kind("mask", mask, logits, MASKS)
    bytes_ = mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
    return bytes_.contiguous()


def grouping(
    logits: Tensor,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    objective: Objective,
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Mask and lengths as the operators take them, on the device of the logits, and whether each
    response is known to be one row."""
    token_mask = None if mask is None else mask_of(mask, logits)
    if lengths is None:
        if mask is None or logits.dim() != 3:
            raise ValueError(
                "mask [B, T] (padded logits) or lengths [R] (packed logits, with or without a "
                f"mask) tell which tokens form a response; got logits {list(logits.shape)} and "
                f"{'neither' if mask is None else 'no lengths'}"
            )
        return token_mask, None, False
    if logits.dim() == 3 and logits.shape[0] != 1:
        raise ValueError(
            f"lengths go with packed logits, [N, V] or [1, N, V], got {list(logits.shape)}; padded "
            f"logits take a mask alone"
        )
    given = integers("lengths", lengths)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"lengths must be integers of shape [R], got {given.dtype} of shape {list(given.shape)}"
        )
    # On a GPU looking at the values would mean waiting for it.
    all_ones = False
    looked = given.device.type == "cpu" or os.environ.get("DCPO_KERNELS_CHECK") == "1"
    if looked and not torch.compiler.is_compiling():
        values = given.tolist()
        _check_lengths(values, logits.shape[:-1].numel(), objective)
        all_ones = values.count(1) == len(values)
    given = given.to(logits.device, torch.int64, non_blocking=True).contiguous()
    return token_mask, given, all_ones


def integers(name: str, given: Tensor | Sequence[int]) -> Tensor:
    if isinstance(given, Tensor):
        return given
    try:
        numbers = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be integers [R], got {given!r}") from error
    # torch takes [] for floats
    return numbers.to(torch.int64) if numbers.shape == (0,) else numbers


def per_response(
    name: str,
    x: Tensor,
    logits: Tensor,
    responses: int,
    dtypes: Sequence[torch.dtype],
    to: torch.dtype,
) -> Tensor:
    """One value per response, [R] or [R, 1], contiguous on the device of the logits."""
    _check_tensor(name, x, [responses])
    if list(x.shape) not in ([responses], [responses, 1]):
        raise ValueError(
            f"{name} must have one value per response, shape [{responses}], got {list(x.shape)}"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_names([x.dtype])}")
    return x.to(logits.device, to, non_blocking=True).reshape(responses).contiguous()


def without(conditions: list[Tensor], mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask without the tokens where a condition does not hold, and how many it lost."""
    if not conditions:
        return mask, None
    counted = torch.ones_like(conditions[0]) if mask is None else mask != 0
    kept = counted
    for condition in conditions:
        kept = kept & condition
    return kept, (counted & ~kept).sum()


def _check_lengths(lengths: list[int], rows: int, objective: Objective) -> None:
    for i, length in enumerate(lengths):
        if not 0 <= length <= rows:
            raise ValueError(
                f"lengths[{i}] is {length}, a response can't have fewer than 0 or more than the "
                f"{rows} rows of logits"
            )
    if sum(lengths) != rows:
        whole = (
            f"; objective {objective.name} takes one ratio per response, so each must be whole "
            "in a call: split a batch into micro-batches between responses"
        )
        raise ValueError(
            f"lengths add up to {sum(lengths)}, but there are {rows} rows of logits"
            + (whole if objective.by_response else "")
        )


def per_token_or_response(
    name: str, x: Tensor, logits: Tensor, responses: int, all_ones: bool
) -> tuple[Tensor, bool]:
    """x as contiguous float32, and whether it has one value per response: [R] or [R, 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    tokens, shape = list(logits.shape[:-1]), list(x.shape)
    per_response = shape in ([responses], [responses, 1])
    if not per_response and shape != tokens:
        raise ValueError(
            f"{name} must have one value per token, {tokens}, or one per response, [{responses}]; "
            f"got shape {shape}"
        )
    if shape == [responses] == tokens and responses > 1 and not all_ones:
        raise ValueError(
            f"{name} of shape {shape} could have one value per token or one per response, because "
            f"there are as many of one as of the other; pass [{responses}, 1] for one per "
            f"response, or leave out responses without tokens"
        )
    check_kind(name, x, logits, FLOATS)
    return x.to(torch.float32).contiguous(), per_response


def targets(target_ids: Tensor, logits: Tensor) -> Tensor:
    """One id per token, or K of them."""
    if not isinstance(target_ids, Tensor) or target_ids.dim() != logits.dim():
        return rows_of("target_ids", target_ids, logits, IDS, torch.int64)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    most = MAX_K if with_gradient else MAX_K_READ
    if target_ids.shape[:-1] != logits.shape[:-1] or not 1 <= target_ids.shape[-1] <= most:
        where = "with a gradient" if with_gradient else "without a gradient"
        raise ValueError(
            f"target_ids must have one value per token, shape {list(logits.shape[:-1])}, or K in "
            f"1..{most} ({where}), shape {[*logits.shape[:-1], 'K']}; got {list(target_ids.shape)}"
        )
    check_kind("target_ids", target_ids, logits, IDS)
    return target_ids.to(torch.int64).contiguous()


def temperature_number(temperature: float) -> float:
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not _TINY <= temperature <= _HUGE:
        raise ValueError(f"temperature={temperature} must be > 0 and finite in float32")
    return float(temperature)


def softcap_number(softcap: float | None) -> float:
    """0 where there is none. Its range is what float32 can divide by."""
    if softcap is None:
        return 0.0
    if not isinstance(softcap, Real) or isinstance(softcap, bool):
        raise TypeError(f"logit_softcap must be a number or None, got {softcap!r}")
    if not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"logit_softcap={softcap} must be > 0 and finite, from 1e-30 to 1e30")
    return float(softcap)


def temperatures(temperature: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """Looked at on a CPU; on a GPU a temperature that is not > 0 gives NaN."""
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be {_names(FLOATS)}, got {_names([temperature.dtype])}")
    if temperature.dim() == 0:
        temperature = temperature.expand(logits.shape[:-1])
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((temperature >= _TINY) & (temperature <= _HUGE))
        if mask is not None and mask.shape == temperature.shape:
            bad &= mask != 0
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(
                f"temperature{at} is {float(temperature[tuple(at)])}, must be > 0 and finite in "
                f"float32"
            )
    return temperature


def total(
    name: str, total: int | float | Tensor | None, logits: Tensor
) -> tuple[int | None, Tensor | None]:
    """A total of the whole batch, as an integer or as a scalar on the device of the logits."""
    if total is None:
        return None, None
    if isinstance(total, Tensor):
        if total.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {list(total.shape)}")
        return None, total.to(logits.device, torch.float32, non_blocking=True)
    if torch.compiler.is_compiling():
        return total, None  # pyright: ignore[reportReturnType] symbolic
    if not isinstance(total, Real) or isinstance(total, bool):
        raise TypeError(f"{name} must be a number or a tensor, got {total!r}")
    if not total > 0:
        raise ValueError(f"{name}={total} must be > 0")
    if isinstance(total, Integral) or total == int(total):
        return int(total), None
    return None, torch.tensor(total, dtype=torch.float32, device=logits.device)


def loss_scale(scale: float | Tensor | None, logits: Tensor) -> float | Tensor | None:
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"loss_scale must be one number, got shape {list(scale.shape)}")
        return scale.to(logits.device, torch.float32).reshape(())
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"loss_scale must be a number or a tensor, got {scale!r}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"loss_scale={scale} must be > 0 and finite")
    return float(scale)


def topk(
    objective: Objective, ids: Tensor | None, logprobs: Tensor | None, logits: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    by_function = objective.function is not None and ids is not None and logprobs is not None
    if not objective.needs_topk and not by_function:
        if ids is not None or logprobs is not None:
            raise ValueError(
                f"topk_ids and topk_logprobs are for the top-K divergences (not "
                f"{objective.divergence!r}) and score centering, or both of them for a function"
            )
        return None, None
    if ids is None or logprobs is None:
        missing = "topk_ids" if ids is None else "topk_logprobs"
        raise ValueError(
            f"{objective.beyond_target} needs {missing}, shape {[*logits.shape[:-1], 'K']}"
        )
    most = MAX_K - by_function  # a function has the target's beside them
    for name, x, dtypes in (("topk_ids", ids, IDS), ("topk_logprobs", logprobs, FLOATS)):
        _check_tensor(name, x, [*logits.shape[:-1], "K"])
        if (
            x.dim() != logits.dim()
            or list(x.shape[:-1]) != list(logits.shape[:-1])
            or not 1 <= x.shape[-1] <= most
        ):
            raise ValueError(
                f"{name} must have shape {[*logits.shape[:-1], 'K']} with K in 1..{most}, got "
                f"{list(x.shape)}"
            )
        check_kind(name, x, logits, dtypes)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"topk_ids {list(ids.shape)} and topk_logprobs {list(logprobs.shape)} differ in K"
        )
    return ids.to(torch.int64).contiguous(), logprobs.to(torch.float32).contiguous()


def old_logits(
    objective: Objective, old_logits: Tensor | None, logits: Tensor, backend: str
) -> Tensor | None:
    if not objective.needs_old_logits:
        if old_logits is not None:
            raise ValueError(
                f"old_logits are for the divergences tv and kl, not {objective.divergence!r}"
            )
        return None
    if old_logits is None:
        raise ValueError(
            f"divergence={objective.divergence!r} needs old_logits, shape {list(logits.shape)}"
        )
    _check_tensor("old_logits", old_logits, logits.shape)
    if list(old_logits.shape) != list(logits.shape):
        raise ValueError(
            f"old_logits must have the logits' shape {list(logits.shape)}, got "
            f"{list(old_logits.shape)}"
        )
    check_logits("old_logits", old_logits, backend)
    if old_logits.device != logits.device:
        raise ValueError(f"old_logits is on {old_logits.device}, logits are on {logits.device}")
    return old_logits.detach()
