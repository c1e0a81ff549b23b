"""Launches the Triton kernels. Arguments were checked and results allocated by the operators.

They run on the GPUs that Triton serves and, where TRITON_INTERPRET=1 was set before the first use,
on CPU tensors in its interpreter: for tests, some thousand times slower.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels.backends.layout import row_count, row_strides

if TYPE_CHECKING:
    from dcpo_kernels.objective import Numbers
    from dcpo_kernels.ops import records

_kernels: dict[str, Any] = {}
try:
    import triton

    from dcpo_kernels.kernels import decisions, row
    from dcpo_kernels.kernels import finish as of_finish
    from dcpo_kernels.kernels import token_weights as of_weights
except ImportError as error:
    _missing = f"triton can't be imported ({error}); `pip install triton` brings it"
    _interpreted = False
else:
    _missing = ""
    _kernels = {
        name: getattr(row, name) for name in ("fused", "row_stats", "row_gradient", "multiply_")
    }
    _kernels["token_weights"] = of_weights.token_weights
    _kernels["decide"] = decisions.decide
    _kernels["finish"] = of_finish.finish
    _interpreted = not isinstance(row.fused, triton.JITFunction)


def unavailable(device: str = "cuda") -> str:
    if _missing:
        return _missing
    if device == "cpu":
        return "" if _interpreted else "on a CPU it needs TRITON_INTERPRET=1, set before it is used"
    if _interpreted:
        return "TRITON_INTERPRET=1 is set, and the interpreter serves CPU tensors"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or later"
    return ""


# How the rows are spread over the GPU. 512 threads with 128 registers each fill a multiprocessor. A
# thread holds up to 64 logits of 16 bits, or 32 of 32 bits, in 32 of its registers: 64 KiB of loads
# in flight per multiprocessor. At 4.8 TB/s and 1 us of latency an H200 needs 36 KiB in each of 132.
#
# Kernels that pass over a row once take programs of 128 threads: while one waits for its row's
# first logits or reduces its row, the three others keep the memory busy.
#
# `fused` reads a row twice but for its last tile, which stays in registers. So it matters how many
# rows are under way: they should last in the L2 cache until the second sweep. A row of one tile
# takes a program as small as holds it. Longer rows take two programs of 256 threads where they fit
# into L2, else one of 512: at 151,936 in bf16 that keeps 35 MB in flight, for an L2 of 50; two
# programs would keep 72 MB and re-read half of it from memory. Reasoned, not measured: no GPU has
# run it yet; `dcpo bench --suite gpu-sweep` times the other choices.
_THREADS = 512  # of a multiprocessor, with 128 registers each
_L2_SHARE = 0.6  # for the rows under way


class Device(NamedTuple):
    multiprocessors: int
    warp: int  # threads
    l2_bytes: int


@functools.lru_cache(maxsize=256)
def launch_shape(
    kernel: str,
    vocab: int,
    size: int,
    aligned: bool,
    registers: int,
    device: Device,
    threads: int = 0,
) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """For rows of a vocabulary of `size` bytes per logit: programs the GPU runs at once, (BLOCK,
    LANES), options of the compiler. registers: how many a thread has for its logits; threads: of a
    program, 0 where they are chosen here."""
    # Only vector loads leave two 16-bit logits in a register.
    most, least = (registers * 4 // size, 16 // size) if aligned else (registers, 1)
    row = 1 << (vocab - 1).bit_length()
    if not threads:
        threads = 256 if kernel == "fused" else 128
        rows = device.multiprocessors * (_THREADS // threads)
        under_way = rows * (vocab - threads * most) * size
        if kernel == "fused" and under_way > _L2_SHARE * device.l2_bytes:
            threads = _THREADS
    lanes = max(device.warp, min(threads, row // most))
    each = max(least, min(most, row // lanes))
    # Triton 3.10 changes the default of enable_fp_fusion; the bits should not change with it.
    options: dict[str, Any] = {"num_warps": lanes // device.warp, "enable_fp_fusion": True}
    if torch.version.hip is None:  # else ptxas may spill to fit in 64
        options["maxnreg"] = 65536 // _THREADS
    return device.multiprocessors * (_THREADS // lanes), (lanes * each, lanes), options


@functools.cache
def _device(index: int) -> Device:
    if _interpreted:
        return Device(1, 32, 0)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.warp_size, properties.L2_cache_size)


def _layout(x: Tensor) -> tuple[tuple[int, int, int], bool]:
    """row_strides, and whether every row begins on 16 bytes."""
    strides = row_strides(x)
    _, batch_stride, row_stride = strides
    bits = x.data_ptr() | (batch_stride | row_stride) * x.element_size()
    return strides, bits % 16 == 0


# Cache of compiled kernels: triton.jit needs 50 us to find one. Key: all that it specializes on,
# constants, dtype, device, and which arguments are None. Value: the kernel, and its argument count
# (until Triton 3.2 it was called without constants).
_compiled: dict[tuple[Any, ...], tuple[Any, int]] = {}


def _launch(
    name: str,
    x: Tensor,
    arguments: tuple[Any, ...],
    *constants: Any,
    aligned: tuple[bool, ...],
    registers: int = 32,
    threads: int = 0,
) -> None:
    """Each program walks down the rows with the number of programs as its stride."""
    vocab, size, device = x.shape[-1], x.element_size(), _device(x.get_device())
    programs, shape, options = launch_shape(
        name, vocab, size, aligned[0], registers, device, threads
    )
    constants = (*constants, *aligned, aligned[0] and vocab * size % 16 == 0, *shape)
    _run(name, x, arguments, constants, min(row_count(x), programs), options)


def _run(
    name: str,
    x: Tensor,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    programs: int,
    options: dict[str, Any],
) -> None:
    """On torch's current stream of x's device."""
    index = x.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _run(name, x, arguments, constants, programs, options)
    grid = (programs, 1, 1)
    key = (name, index, x.dtype, constants, tuple(map(type, arguments)))
    arguments = (*arguments, *constants)
    if key in _compiled:
        compiled, count = _compiled[key]
        compiled[grid](*arguments[:count])
        return
    compiled = _kernels[name][grid](*arguments, **options)
    if compiled is not None:  # as in the interpreter
        _compiled[key] = compiled, len(compiled.src.signature)


def _constants(numbers: Numbers) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    """What a kernel is compiled for, and the numbers that it is given."""
    surrogate, divergence, kl, old_kl, rollout_mode, centering, *values = numbers
    constants = (
        surrogate,
        divergence,
        kl if numbers.kl_coef != 0 else None,
        old_kl if numbers.old_kl_coef != 0 else None,
        numbers.entropy_coef != 0,
        numbers.penalty_coef != 0,
        centering != 0,
        rollout_mode,
    )
    return constants, tuple(values)


def fused(
    logits: Tensor,
    gradient: Tensor | None,  # like logits, or logits itself; None: read and decide only
    rows: records.Rows,
    tokens: records.Tokens,
    numbers: Numbers,
    options: records.Options,
    results: records.Results,
    written: records.Written,
    threads: int = 0,  # of a program; 0: as launch_shape chooses
) -> None:
    constants, values = _constants(numbers)
    results = results._replace(entropy=_filled(results.entropy))
    dx, old = logits if gradient is None else gradient, rows.old_logits
    (strides, aligned), (dx_strides, dx_aligned) = _layout(logits), _layout(dx)
    old_strides, old_aligned = (strides, aligned) if old is None else _layout(old)
    registers = 32
    if old is not None:
        registers = 8
    elif results.entropy is not None or rows.topk_ids is not None or options.softcap:
        registers = 16
    _launch(
        "fused",
        logits,
        (
            logits,
            gradient,
            *rows,
            *tokens,
            *results,
            *written,
            row_count(logits),
            logits.shape[-1],
            0 if rows.topk_ids is None else rows.topk_ids.shape[-1],
            *strides,
            *dx_strides[1:],
            *old_strides[1:],
            options.temperature,
            options.softcap or None,
            *values,
        ),
        *constants,
        aligned=(aligned, dx_aligned, old_aligned),
        registers=registers,
        threads=threads,
    )


def row_stats(
    logits: Tensor, targets: records.Targets, options: records.Options, stats: records.RowStats
) -> None:
    strides, aligned = _layout(logits)
    k = targets.target_ids.numel() // row_count(logits)
    mask = None if targets.mask is None else targets.mask.view(torch.uint8)
    _launch(
        "row_stats",
        logits,
        (
            logits,
            targets.target_ids,
            mask,
            targets.temperatures,
            *stats._replace(entropy=_filled(stats.entropy)),
            row_count(logits),
            logits.shape[-1],
            k,
            *strides,
            options.temperature,
            options.softcap or None,
        ),
        k > 1,
        aligned=(aligned,),
    )


def row_gradient(
    logits: Tensor,
    gradient: Tensor,  # like logits, or logits itself
    coefficients: records.RowCoefficients,
    factor: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    (strides, aligned), (dx_strides, dx_aligned) = _layout(logits), _layout(gradient)
    k = coefficients.target_ids.numel() // row_count(logits)
    _launch(
        "row_gradient",
        logits,
        (
            logits,
            gradient,
            *coefficients,
            factor,
            row_count(logits),
            logits.shape[-1],
            k,
            *strides,
            *dx_strides[1:],
            temperature,
            softcap or None,
        ),
        k > 1,
        aligned=(aligned, dx_aligned),
    )


def multiply_(x: Tensor, factor: Tensor) -> None:
    strides, aligned = _layout(x)
    arguments = (x, factor, row_count(x), x.shape[-1], *strides)
    _launch("multiply_", x, arguments, aligned=(aligned,))


# ---- around the vocabulary kernel ---------------------------------------------------------------

# Rows that a program takes at once, and its warps.
_SMALL = {"token_weights": (4096, 16), "decide": (1024, 4), "finish": (2048, 8)}
_VALUES = 4  # that token_weights can spread


def _launch_small(
    name: str, x: Tensor, programs: int, arguments: tuple[Any, ...], *constants: Any
) -> None:
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments):
        raise TypeError(f"{name} takes float32 for Triton's kernels, got float64")
    block, warps = _SMALL[name]
    options = {"num_warps": warps, "enable_fp_fusion": True}
    _run(name, x, arguments, (*constants, block), programs, options)


def _filled(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _number(x: int | None) -> float | None:
    return None if x is None else float(x)


def token_weights(
    grouping: records.Grouping,
    values: list[Tensor],
    responses: records.Responses,
    spread: list[Tensor],
) -> None:
    if len(values) > _VALUES:
        raise ValueError(f"token_weights spreads up to {_VALUES} values, got {len(values)}")
    missing = [None] * (_VALUES - len(values))
    count = responses.lengths.numel()
    _launch_small(
        "token_weights",
        responses.weights,
        1,
        (
            None if grouping.mask is None else grouping.mask.view(torch.uint8),
            grouping.lengths,
            grouping.response_lengths,
            grouping.weights,
            _number(grouping.num_responses),
            _number(grouping.num_tokens),
            _number(grouping.max_length),
            grouping.num_responses_on_device,
            grouping.num_tokens_on_device,
            grouping.max_length_on_device,
            grouping.skip_zero,
            responses.weights,
            responses.mask.view(torch.uint8),
            responses.offsets,
            responses.lengths,
            *values,
            *missing,
            *spread,
            *missing,
            responses.mask.numel(),
            count,
        ),
        grouping.aggregation,
        grouping.skip_by_response,
        grouping.skip_whole_responses,
        1 if count <= 16 else 64,  # responses taken at once
    )


def decide(
    read: records.Read,
    tokens: records.Tokens,
    numbers: Numbers,
    groups: records.RatioGroups,
    decisions: records.Decisions,
    coefficients: records.Coefficients,
) -> None:
    rows, count = read.logprobs.numel(), groups.lengths.numel()
    constants, values = _constants(numbers)
    by_rows = -(-rows // _SMALL["decide"][0])
    _launch_small(
        "decide",
        read.logprobs,
        max(count, 1) if groups.by_response else by_rows,
        (
            *read,
            *tokens,
            groups.offsets,
            groups.lengths,
            *decisions,
            coefficients.g,
            _filled(coefficients.h),
            rows,
            count,
            *values,
        ),
        *constants,
        groups.by_response,
        groups.spread,
    )


def finish(results: records.Results, responses: records.Responses, totals: records.Totals) -> None:
    count = responses.lengths.numel()
    _launch_small(
        "finish",
        results.token_loss,
        1 + count,
        (
            results.token_loss,
            results.logprobs,
            _filled(results.entropy),
            results.ratio,
            results.clipped,
            responses.weights,
            responses.mask.view(torch.uint8),
            responses.offsets,
            responses.lengths,
            *totals,
            results.token_loss.numel(),
        ),
    )
