"""Launches the Triton kernels. Arguments were checked and results allocated by the operators.

They run on the GPUs that Triton serves and, where TRITON_INTERPRET=1 was set before the first use,
on CPU tensors in its interpreter: for tests, some thousand times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.backends.layout import row_count, row_strides

kernels: Any = None
try:
    import triton

    from dcpo_kernels.kernels import row as kernels
except ImportError as error:
    _missing = f"triton can't be imported ({error}); `pip install triton` brings it"
    _interpreted = False
else:
    _missing = ""
    _interpreted = not isinstance(kernels.fused, triton.JITFunction)


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


# How the rows are spread over the GPU: 32 logits a thread and 1024 threads a multiprocessor, so a
# thread may have 64 registers, of which its logits take 16 (bf16) or 32. Then a multiprocessor has
# 64 KiB of bf16 loads in flight; at 4.8 TB/s and 1 us of latency an H200 wants 36 KiB from each of
# its 132.
#
# `fused` reads a row twice, so it matters how many rows are under way. At a vocabulary of 151,936
# in bf16 a row has 304 KB, of which the last tile, 42 KB, stays in registers. With one program of
# 1024 threads a multiprocessor, 132 rows leave 35 MB to the L2 cache (50 MB) until the second
# sweep; two programs of 512 threads would leave twice that and send half of it to memory again, 1
# byte in 5 more. Hence the largest tile there is. At 128,256: 3 tiles of 64 KB, 26 MB, and 30 K
# logits in registers. In fp32 it is 70 and 52 MB, and what doesn't fit costs its second read. Rows
# of one tile (V <= 32,768) are not read twice.
#
# The other kernels pass over a row once. There several programs a multiprocessor are better: while
# one waits for its row's first logits or reduces its row, the others keep the memory busy.
_THREADS = 512  # of a multiprocessor, with 128 registers each
_PROGRAM = {"fused": 512}  # threads of a program, at most
_PROGRAM |= dict.fromkeys(("row_stats", "row_gradient", "scale"), 128)


@functools.lru_cache(maxsize=256)
def _shape(
    kernel: str, vocab: int, size: int, aligned: bool, registers: int, device: int
) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """For rows of a vocabulary of `size` bytes a logit: programs the GPU runs at once, (BLOCK,
    LANES), options of the compiler. registers: how many a thread has for its logits; more than 16
    of them are used where a row is longer than a tile."""
    multiprocessors, warp = _device(device)
    few = min(registers, 16)
    # Only vector loads leave two 16-bit logits in a register.
    each = few * 4 // size if aligned else few
    lanes = min(_PROGRAM[kernel], max(warp, (1 << (vocab - 1).bit_length()) // each))
    if lanes * each < vocab:
        each *= registers // few
    # Triton 3.10 changes the default of enable_fp_fusion; the bits should not change with it.
    options: dict[str, Any] = {"num_warps": lanes // warp, "enable_fp_fusion": True}
    if torch.version.hip is None:  # else ptxas may spill to fit in 64
        options["maxnreg"] = 65536 // _THREADS
    return multiprocessors * (_THREADS // lanes), (lanes * each, lanes), options


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Multiprocessors and threads of a warp."""
    if _interpreted:
        return 1, 32
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.warp_size


def _layout(x: Tensor) -> tuple[tuple[int, int, int], bool]:
    """row_strides, and whether every row begins on 16 bytes."""
    strides = row_strides(x)
    _, batch_stride, row_stride = strides
    bits = x.data_ptr() | (batch_stride | row_stride) * x.element_size()
    return strides, bits % 16 == 0


# Finding the compiled kernel among 50 arguments takes triton.jit some 50 us a call. Here it takes a
# key: whatever a kernel is compiled for is a constant, the dtype, the device, or an argument that
# is None.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    name: str,
    x: Tensor,
    arguments: tuple[Any, ...],
    *constants: Any,
    aligned: tuple[bool, ...],
    registers: int = 32,
) -> None:
    """On torch's current stream of x's device. Rows in order: the grid is a part of them, and each
    program goes on to the row that many further."""
    index = x.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _launch(name, x, arguments, *constants, aligned=aligned, registers=registers)
    vocab, size = x.shape[-1], x.element_size()
    programs, shape, options = _shape(name, vocab, size, aligned[0], registers, index)
    constants = (*constants, *aligned, aligned[0] and vocab * size % 16 == 0, *shape)
    grid = (min(row_count(x), programs), 1, 1)
    key = (name, index, x.dtype, constants, tuple(map(type, arguments)))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = getattr(kernels, name)[grid](*arguments, *constants, **options)
    else:
        compiled[grid](*arguments, *constants)


def fused(
    logits: Tensor,
    gradient: Tensor | None,
    target_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    old_logits: Tensor | None,
    objective: Sequence[float],
    temperature: float,
    skip_zero_advantage: bool,
    token_loss: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    clipped: Tensor,
) -> None:
    surrogate, divergence, *numbers = objective
    entropies = entropy if entropy.numel() else None
    kl_coef, entropy_coef, penalty_coef = numbers[-3:]
    strides, aligned = _layout(logits)
    gradient_strides, gradient_aligned = old_strides, old_aligned = strides, aligned
    if gradient is not None and gradient is not logits:
        gradient_strides, gradient_aligned = _layout(gradient)
    if old_logits is not None:
        old_strides, old_aligned = _layout(old_logits)
    _launch(
        "fused",
        logits,
        (
            logits,
            gradient,
            old_logits,
            target_ids,
            old_logprobs,
            advantages,
            weights,
            ref_logprobs,
            importance_weights,
            topk_ids,
            topk_logprobs,
            token_loss,
            logprobs,
            entropies,
            ratio,
            clipped,
            row_count(logits),
            logits.shape[-1],
            0 if topk_ids is None else topk_ids.shape[1],
            *strides,
            *gradient_strides[1:],
            *old_strides[1:],
            temperature,
            *numbers,
        ),
        surrogate,
        divergence,
        kl_coef != 0,
        entropy_coef != 0,
        penalty_coef != 0,
        skip_zero_advantage,
        aligned=(aligned, gradient_aligned, old_aligned),
        registers=32
        if entropies is None and topk_ids is None and old_logits is None
        else 16
        if old_logits is None
        else 8,
    )


def row_stats(
    logits: Tensor,
    target_ids: Tensor,
    counts: Tensor | None,
    temperature: float,
    logprobs: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    strides, aligned = _layout(logits)
    _launch(
        "row_stats",
        logits,
        (
            logits,
            target_ids,
            counts,
            logprobs,
            entropy if entropy.numel() else None,
            row_max,
            log_sum,
            row_count(logits),
            logits.shape[-1],
            *strides,
            temperature,
        ),
        aligned=(aligned,),
    )


def row_gradient(
    logits: Tensor,
    gradient: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    temperature: float,
) -> None:
    strides, aligned = _layout(logits)
    gradient_strides, gradient_aligned = _layout(gradient)
    _launch(
        "row_gradient",
        logits,
        (
            logits,
            gradient,
            target_ids,
            row_max,
            log_sum,
            None if h is None else entropy,
            g,
            h,
            row_count(logits),
            logits.shape[-1],
            *strides,
            *gradient_strides[1:],
            temperature,
        ),
        aligned=(aligned, gradient_aligned),
    )


def scale(x: Tensor, scale: Tensor) -> None:
    strides, aligned = _layout(x)
    arguments = (x, scale, row_count(x), x.shape[-1], *strides)
    _launch("scale", x, arguments, aligned=(aligned,))
