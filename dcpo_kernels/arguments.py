"""What `losses` accepts, checked and brought to one row a token before any kernel runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import backends
from dcpo_kernels.aggregation import response_weights
from dcpo_kernels.objectives import MAX_K, Objective

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_logits(logits: Tensor, temperature: float, backend: str, name: str = "logits") -> str:
    """The backend that will serve these logits."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{name} must be packed [N, V] or padded [B, T, V], got shape {list(logits.shape)}"
        )
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} has an empty vocabulary: shape {list(logits.shape)}")
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not _TINY <= temperature <= _HUGE:
        raise ValueError(f"temperature={temperature} must be > 0 and finite in float32")
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
    if logits.requires_grad and logits.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "inplace=True would overwrite logits that are a leaf of the graph; pass inplace=False"
        )
    if torch.compiler.is_compiling():  # would be a guard on the strides
        return
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"inplace=True needs logits with a place for each row, got strides "
                f"{list(logits.stride())}"
            )
        reach += stride * (size - 1)


def rows_of(
    name: str,
    x: Tensor,
    logits: Tensor,
    dtypes: Sequence[torch.dtype],
    to: torch.dtype,
) -> Tensor:
    """One value a token, [N] or [B, T] as the logits have them, as a contiguous [N] of the kernels'
    dtype."""
    tokens = list(logits.shape[:-1])
    _check_tensor(name, x, tokens)
    if list(x.shape) != tokens:
        raise ValueError(f"{name} must have one value a token, shape {tokens}, got {list(x.shape)}")
    _check_kind(name, x, logits, dtypes)
    return x.detach().to(to).reshape(-1).contiguous()


def _check_tensor(name: str, x: object, shape: Sequence[object]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {list(shape)}, got {type(x).__name__}")


def _check_kind(name: str, x: Tensor, logits: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_names([x.dtype])}")
    if x.device != logits.device:
        raise ValueError(f"{name} is on {x.device}, logits are on {logits.device}")


IDS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS)


class Responses(NamedTuple):
    """Which tokens belong together."""

    counts: Tensor  # [N] bool: the token counts
    lengths: Tensor  # [R] int64: tokens of each response that count
    index: Tensor | None  # [N] int64: its response; None where they are padded, N = R T


def spread(x: Tensor, responses: Responses) -> Tensor:
    """[N], each token with what its response has in x [R]."""
    if responses.index is not None:
        return x[responses.index]
    time = len(responses.counts) // max(len(x), 1)
    return x[:, None].expand(len(x), time).reshape(-1)


def response_sums(x: Tensor, responses: Responses) -> Tensor:
    """[R] sums over each response's tokens, in a fixed order; x [N] is 0 where a token does not
    count."""
    if responses.index is None:
        batch = len(responses.lengths)
        return x.view(batch, x.numel() // max(batch, 1)).sum(1)
    return torch.segment_reduce(x, "sum", lengths=responses.lengths, unsafe=True, initial=0.0)


def responses_of(
    logits: Tensor,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    objective: Objective,
) -> Responses:
    if (mask is None) == (lengths is None):
        raise ValueError(
            "exactly one of mask [B, T] (padded logits) and lengths [R] (packed logits) tells "
            "which tokens form a "
            f"response; got {'both' if mask is not None else 'neither'}"
        )
    if mask is not None:
        if logits.dim() != 3:
            raise ValueError(
                f"mask goes with logits [B, T, V], got {list(logits.shape)}; packed logits take "
                f"lengths"
            )
        _check_tensor("mask", mask, logits.shape[:2])
        if list(mask.shape) != list(logits.shape[:2]):
            raise ValueError(
                f"mask must have shape {list(logits.shape[:2])}, got {list(mask.shape)}"
            )
        _check_kind("mask", mask, logits, MASKS)
        counts = mask != 0
        return Responses(counts.reshape(-1), counts.sum(1), None)

    if logits.dim() != 2:
        raise ValueError(
            f"lengths go with packed logits [N, V], got {list(logits.shape)}; padded logits take a "
            f"mask"
        )
    if isinstance(lengths, Tensor):
        given = lengths
    else:
        try:
            given = torch.as_tensor(lengths)
        except (TypeError, ValueError) as error:
            raise TypeError(f"lengths must be integers [R], got {lengths!r}") from error
        if given.shape == (0,):  # torch takes [] for floats
            given = given.to(torch.int64)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"lengths must be integers of shape [R], got {given.dtype} of shape {list(given.shape)}"
        )
    rows = logits.shape[0]
    # On a GPU looking at the values would mean waiting for it.
    looked = given.device.type == "cpu" or os.environ.get("DCPO_KERNELS_CHECK") == "1"
    looked = looked and not torch.compiler.is_compiling()
    if looked:
        if len(given) and int(given.min()) < 0:
            raise ValueError(
                f"lengths[{int(given.argmin())}] is {int(given.min())}, a response can't have "
                f"fewer than 0"
            )
        if int(given.sum()) != rows:
            whole = (
                f"; objective {objective.name} takes one ratio per response, so each must be whole "
                "in a call: split a batch into micro-batches between responses"
            )
            raise ValueError(
                f"lengths add up to {int(given.sum())}, but there are {rows} rows of logits"
                + (whole if objective.ratio_level == "sequence" else "")
            )
    lengths_ = given.to(logits.device, torch.int64, non_blocking=True)
    if looked:
        # not repeat_interleave, which takes all threads for a handful of rows
        index = torch.searchsorted(
            lengths_.cumsum(0), torch.arange(rows, device=logits.device), right=True
        )
        return Responses(torch.ones_like(index, dtype=torch.bool), lengths_, index)
    # Whatever they are, nothing is read outside the rows.
    ends = lengths_.cumsum(0).clamp(0, rows).cummax(0).values
    lengths_ = ends.diff(prepend=ends.new_zeros(1))
    row = torch.arange(rows, device=logits.device)
    index = torch.searchsorted(ends, row, right=True)
    counts = index < len(lengths_)
    return Responses(counts, lengths_, index.clamp(max=max(len(lengths_) - 1, 0)))


def per_token(name: str, x: Tensor, logits: Tensor, responses: Responses) -> Tensor:
    """[N] float32 from one value a token or one a response (which is what [R] means where R =
    N)."""
    count = len(responses.lengths)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if list(x.shape) == [count]:
        _check_kind(name, x, logits, FLOATS)
        return spread(x.detach().to(torch.float32), responses)
    if list(x.shape) == list(logits.shape[:-1]):
        return rows_of(name, x, logits, FLOATS, torch.float32)
    raise ValueError(
        f"{name} must have one value a token, {list(logits.shape[:-1])}, or one a response, "
        f"[{count}]; "
        f"got shape {list(x.shape)}"
    )


def weights_of(
    responses: Responses,
    objective: Objective,
    num_responses: int | Tensor | None,
    num_tokens: int | Tensor | None,
    max_length: int | Tensor | None,
) -> Tensor:
    weight = response_weights(
        responses.lengths, objective.aggregation, num_responses, num_tokens, max_length
    )
    return torch.where(responses.counts, spread(weight, responses), 0.0)


def topk_of(
    objective: Objective, ids: Tensor | None, logprobs: Tensor | None, logits: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if not objective.needs_topk:
        if ids is not None or logprobs is not None:
            raise ValueError(
                f"topk_ids and topk_logprobs are for the top-K divergences, not "
                f"{objective.divergence!r}"
            )
        return None, None
    if ids is None or logprobs is None:
        missing = "topk_ids" if ids is None else "topk_logprobs"
        raise ValueError(
            f"divergence={objective.divergence!r} needs {missing}, shape "
            f"{[*logits.shape[:-1], 'K']}"
        )
    for name, x, dtypes in (("topk_ids", ids, IDS), ("topk_logprobs", logprobs, FLOATS)):
        _check_tensor(name, x, [*logits.shape[:-1], "K"])
        if (
            x.dim() != logits.dim()
            or list(x.shape[:-1]) != list(logits.shape[:-1])
            or not 1 <= x.shape[-1] <= MAX_K
        ):
            raise ValueError(
                f"{name} must have shape {[*logits.shape[:-1], 'K']} with K in 1..{MAX_K}, got "
                f"{list(x.shape)}"
            )
        _check_kind(name, x, logits, dtypes)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"topk_ids {list(ids.shape)} and topk_logprobs {list(logprobs.shape)} differ in K"
        )
    k = ids.shape[-1]
    return (
        ids.to(torch.int64).reshape(-1, k).contiguous(),
        logprobs.detach().to(torch.float32).reshape(-1, k).contiguous(),
    )


def old_logits_of(
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
    _check_kind("old_logits", old_logits, logits, (logits.dtype,))
    check_logits(old_logits, 1.0, backend, "old_logits")
    return old_logits.detach()
