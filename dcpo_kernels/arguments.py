"""The door: what `losses` accepts, checked once and brought to the records that the operators
take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcpo_kernels import backends, presets
from dcpo_kernels.objective import AGGREGATIONS, MAX_K, WHOLE_RESPONSE, Objective
from dcpo_kernels.ops.library import check_places
from dcpo_kernels.ops.records import Grouping, Options, Rows, Targets, Tokens, replaced

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IDS = (torch.int64, torch.int32)
MAX_K_READ = 1024  # ids per row of selected_logprobs; MAX_K where a gradient is to come
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGERS += (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS)
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Batch(NamedTuple):
    """Everything that a loss was told, but for its logits or log-probabilities."""

    backend: str
    objective: Objective
    grouping: Grouping
    tokens: Tokens  # its weights are to come, from `grouping`
    by_response: dict[str, Tensor]  # fields of tokens and rows that came as [R] float32
    entropy_weights: Tensor | None  # as they came: not yet multiples of the weights
    dropped: Tensor | None  # scalar: tokens that don't count because they are not finite
    ratio_by_response: bool  # each response has one ratio, and all of its tokens are in the call
    rows: Rows
    options: Options
    loss_scale: float | Tensor | None
    inplace: bool


_DEFAULT = presets.dcpo()


def objective_of(objective: object) -> Objective:
    """A preset, or a function that is one."""
    if objective is None:
        return _DEFAULT
    if isinstance(objective, Objective):
        return objective
    name = getattr(objective, "__name__", "function")
    if not callable(objective) or getattr(presets, name, None) is objective:
        raise TypeError(
            f"objective must be an Objective such as dcpo(), or a function from TokenValues to a "
            f"loss per token, got {objective!r}"
        )
    return Objective(name, function=objective)


_NO_ROWS: Any = Rows(*[None] * len(Rows._fields))  # pyright: ignore[reportArgumentType]


def token_batch(
    logits: Tensor,  # or whatever else has the tokens' shape and one axis more
    objective: Objective,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    weights: Tensor | None,
    response_lengths: Tensor | Sequence[int] | None,
    response_log_ratio: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy_weights: Tensor | None,
    num_responses: int | Tensor | None,
    num_tokens: int | Tensor | None,
    max_length: int | Tensor | None,
    skip_zero_advantage: bool,
    drop_nonfinite: bool,
    found: Tensor | None = None,  # per token, whether there is a log-probability at all
    backend: str,
) -> Batch:
    """What is said of tokens and responses."""
    token_mask, row_lengths, all_ones = _grouping(logits, mask, lengths, objective)
    responses = logits.shape[0] if row_lengths is None else row_lengths.shape[0]
    by_response: dict[str, Tensor] = {}

    def value(name: str, x: Tensor | None) -> Tensor | None:
        """[N] float32, or None where it is [R]: then it waits in by_response."""
        if x is None:
            return None
        x, per_response = _per_token_or_response(name, x, logits, responses, all_ones)
        if per_response:
            by_response[name] = x
            return None
        return x

    def per_token(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else floats(name, x, logits)

    if ref_logprobs is None and objective.kl_coef != 0:
        raise ValueError(
            f"objective {objective.name} has kl_coef={objective.kl_coef} and needs ref_logprobs"
        )
    if entropy_weights is not None and objective.entropy_coef == 0:
        raise ValueError(
            f"entropy_weights are for the entropy term, and objective {objective.name} has none "
            "(entropy_coef=0)"
        )
    corrects = objective.rollout_mode != "none"
    if corrects != (rollout_logprobs is not None) and objective.function is None:
        raise ValueError(
            f"objective {objective.name} has rollout_mode={objective.rollout_mode!r} and "
            + ("needs rollout_logprobs" if corrects else "no use for rollout_logprobs")
        )
    has_reference = objective.kl_coef != 0 or objective.function is not None
    tokens = Tokens(
        old_logprobs=per_token("old_logprobs", old_logprobs),
        advantages=value("advantages", advantages),  # pyright: ignore[reportArgumentType]
        weights=None,  # pyright: ignore[reportArgumentType]
        ref_logprobs=per_token("ref_logprobs", ref_logprobs) if has_reference else None,
        importance_weights=value("importance_weights", importance_weights),
        log_ratio=None,
        rollout_logprobs=per_token("rollout_logprobs", rollout_logprobs),
        entropy_weights=None,
    )
    one_ratio = objective.by_response
    if response_log_ratio is not None:
        if not one_ratio:
            raise ValueError(
                f"response_log_ratio is for objectives with one ratio per response, and "
                f"{objective.name} has one per token"
            )
        if objective.surrogate in WHOLE_RESPONSE:
            raise ValueError(
                f"response_log_ratio is not all that objective {objective.name} wants of a "
                "response: each must be whole in a call"
            )
        by_response["log_ratio"] = _per_response(
            "response_log_ratio", response_log_ratio, logits, responses, FLOATS, torch.float32
        )
    if response_lengths is not None:
        if one_ratio and response_log_ratio is None:
            raise ValueError(
                f"response_lengths means that responses are not whole in this call, and objective "
                f"{objective.name} takes one ratio of a whole response: pass response_log_ratio "
                f"[{responses}] too, its log-ratio"
            )
        response_lengths = _integers("response_lengths", response_lengths)
        response_lengths = _per_response(
            "response_lengths", response_lengths, logits, responses, INTEGERS, torch.int64
        )
    dropped = None
    if drop_nonfinite:
        known = (tokens.old_logprobs, tokens.rollout_logprobs)
        finite = [x.isfinite() for x in known if x is not None]
        finite += [] if found is None else [found]
        token_mask, dropped = _without(finite, token_mask)
    skip_zero = None
    if skip_zero_advantage and not objective.pulls_without_advantage:
        skip_zero = by_response.get("advantages", tokens.advantages)
    responses_total = _total("num_responses", num_responses, logits)
    tokens_total = _total("num_tokens", num_tokens, logits)
    length_total = _total("max_length", max_length, logits)
    aggregation = "token-sum" if weights is not None else objective.aggregation
    if max_length is None and aggregation == "seq-mean-token-sum-norm":
        raise ValueError(
            f"aggregation={aggregation!r} needs max_length, the same in every micro-batch"
        )
    ratio_by_response = one_ratio and response_log_ratio is None
    grouping = Grouping(
        mask=token_mask,
        lengths=row_lengths,
        response_lengths=response_lengths,
        weights=per_token("weights", weights),
        aggregation=AGGREGATIONS.index(aggregation),
        num_responses=responses_total[0],
        num_tokens=tokens_total[0],
        max_length=length_total[0],
        num_responses_on_device=responses_total[1],
        num_tokens_on_device=tokens_total[1],
        max_length_on_device=length_total[1],
        skip_zero=skip_zero,
        skip_by_response="advantages" in by_response,
        skip_whole_responses=ratio_by_response,
    )
    return Batch(
        backend=backend,
        objective=objective,
        grouping=grouping,
        tokens=tokens,
        by_response=by_response,
        entropy_weights=per_token("entropy_weights", entropy_weights),
        dropped=dropped,
        ratio_by_response=ratio_by_response,
        rows=_NO_ROWS,
        options=Options(1.0, objective.entropy_coef != 0),
        loss_scale=None,
        inplace=False,
    )


def with_rows(
    batch: Batch,
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    old_logits: Tensor | None,
    loss_scale: float | Tensor | None,
    with_entropy: bool,
    inplace: bool,
) -> Batch:
    """And what is said of the logits."""
    objective, by_response = batch.objective, dict(batch.by_response)
    if inplace:
        check_in_place(logits)
    number, temperatures = 1.0, None
    if isinstance(temperature, Tensor):
        lengths = batch.grouping.lengths
        responses = logits.shape[0] if lengths is None else lengths.shape[0]
        temperatures, per_response = _per_token_or_response(
            "temperature",
            _temperatures(temperature, logits, batch.grouping.mask),
            logits,
            responses,
            False,
        )
        if per_response:
            by_response["temperatures"], temperatures = temperatures, None
    else:
        number = temperature_number(temperature)
    topk_ids, topk_logprobs = _topk(objective, topk_ids, topk_logprobs, logits)
    rows = Rows(
        target_ids=rows_of("target_ids", target_ids, logits, IDS, torch.int64),
        temperatures=temperatures,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        old_logits=_old_logits(objective, old_logits, logits, batch.backend),
    )
    return replaced(
        batch,
        by_response=by_response,
        rows=rows,
        options=Options(number, with_entropy or objective.entropy_coef != 0),
        loss_scale=_loss_scale(loss_scale, logits),
        inplace=inplace,
    )


def targets_of(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    with_entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Targets, Options, str]:
    """The same for `selected_logprobs`."""
    backend = check_logits("logits", logits, backend)
    check_transforms("selected_logprobs", logits)
    if inplace:
        check_in_place(logits)
    token_mask = None if mask is None else mask_of(mask, logits)
    number, temperatures = 1.0, None
    if isinstance(temperature, Tensor):
        temperatures = floats("temperature", _temperatures(temperature, logits, token_mask), logits)
    else:
        number = temperature_number(temperature)
    ids = _targets(target_ids, logits)
    return Targets(ids, token_mask, temperatures), Options(number, with_entropy), backend


def _targets(target_ids: Tensor, logits: Tensor) -> Tensor:
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
    _check_kind("target_ids", target_ids, logits, IDS)
    return target_ids.to(torch.int64).contiguous()


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
    dtypes = (*LOGITS_DTYPES, torch.float64) if backend == "reference" else LOGITS_DTYPES
    if logits.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {_names(dtypes)} for backend={backend!r}, got {_names([logits.dtype])}"
        )
    if backend != "reference" and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous along the vocabulary, got strides {list(logits.stride())}; "
            f"rows may be strided"
        )
    return backend


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


def _check_kind(name: str, x: Tensor, logits: Tensor, dtypes: Sequence[torch.dtype]) -> None:
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
    _check_kind(name, x, logits, dtypes)
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
    _check_kind("mask", mask, logits, MASKS)
    bytes_ = mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
    return bytes_.contiguous()


def _grouping(
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
    given = _integers("lengths", lengths)
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


def _integers(name: str, given: Tensor | Sequence[int]) -> Tensor:
    if isinstance(given, Tensor):
        return given
    try:
        numbers = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be integers [R], got {given!r}") from error
    # torch takes [] for floats
    return numbers.to(torch.int64) if numbers.shape == (0,) else numbers


def _per_response(
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


def _without(conditions: list[Tensor], mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
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


def _per_token_or_response(
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
    _check_kind(name, x, logits, FLOATS)
    return x.to(torch.float32).contiguous(), per_response


def temperature_number(temperature: float) -> float:
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not _TINY <= temperature <= _HUGE:
        raise ValueError(f"temperature={temperature} must be > 0 and finite in float32")
    return float(temperature)


def _temperatures(temperature: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
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


def _total(
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


def _loss_scale(scale: float | Tensor | None, logits: Tensor) -> float | Tensor | None:
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


def _topk(
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
        _check_kind(name, x, logits, dtypes)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"topk_ids {list(ids.shape)} and topk_logprobs {list(logprobs.shape)} differ in K"
        )
    return ids.to(torch.int64).contiguous(), logprobs.to(torch.float32).contiguous()


def _old_logits(
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
