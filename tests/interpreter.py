"""Triton's interpreter, made to round like a GPU and to take an eighth of its time. Imported by
conftest.py where TRITON_INTERPRET=1, before anything runs in it."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Semantic = interpreter.TritonSemantic

# ---- rounding -----------------------------------------------------------------------------------

_convert = interpreter._convert_float


def convert(values, from_dtype, to_dtype, rounding_mode):
    """To bfloat16 it truncates (3.7 to 3.9), and where it rounds a carry goes missing."""
    if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
        return (values.astype(np.uint32) << 16).view(np.float32)
    if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(values, from_dtype, to_dtype, rounding_mode)


def fma(self, x, y, z):
    """Rounded once: the interpreter rounds the product too."""
    with np.errstate(invalid="ignore"):
        exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)


interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_fma = fma

# ---- time: a launch -----------------------------------------------------------------------------

_patch = interpreter._patch_lang


@functools.cache
def languages(module: str):
    """The parts of triton.language that a module of kernels names."""
    values = vars(sys.modules[module]).values()
    return frozenset(id(value) for value in values if value is tl or value is tl.core)


class Patched:
    """triton.language for the time of a launch. The interpreter would patch it anew for every call
    of a device function."""

    scopes: ClassVar[dict[frozenset[int], Any]] = {}  # modules that are patched, and their undoing

    def __init__(self, function):
        self.launch = not self.scopes
        names = languages(function.__module__)
        if names not in self.scopes:
            self.scopes[names] = _patch(function)

    def restore(self):
        while self.launch and self.scopes:
            self.scopes.popitem()[1].restore()


def patch_attribute(owner, name, member, builder, scope):
    """A builtin of triton.language that runs here: one call, where the interpreter has three."""
    function = getattr(member, "__wrapped__", member)

    def patched(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, patched)


class InPlace(interpreter.GridExecutor):
    """Everything here is on the CPU and written where it lies; copying it onto itself would touch
    gigabytes that a test has only reserved."""

    def _restore_args_dev(self, *_):
        pass


interpreter._patch_lang = Patched
interpreter._patch_attr = patch_attribute
interpreter.GridExecutor = InPlace

# ---- time: an operation -------------------------------------------------------------------------
# NumPy takes a microsecond of each; Python looked up types and built shapes for twenty.

known_dtypes: dict[str, np.dtype] = {}
known_blocks: dict[tuple, dict[str, Any]] = {}  # attributes of a block type, by dtype and shape
_numpy_dtype = interpreter._get_np_dtype
_init_block = tl.core.block_type.__init__
_equal = tl.core.dtype.__eq__
_check_operands = Semantic.binary_op_type_checking_impl


def scan(self, values):
    """combine_fn of whole tensors, log2 of their length times, and not once per element."""
    step = 1
    while step < values[0].handle.data.shape[self.axis]:
        first = (*[slice(None)] * self.axis, slice(step))
        before = [self.to_tensor(np.roll(x.handle.data, step, self.axis), x.dtype) for x in values]
        combined = self.combine_fn.fn(*before, *values)
        combined = combined if isinstance(combined, tuple) else (combined,)
        for x, y in zip(combined, values, strict=True):
            x.handle.data[first] = y.handle.data[first]
        values, step = combined, 2 * step
    return list(values)


def numpy_dtype(dtype):
    name = dtype.scalar.name
    if name not in known_dtypes:
        known_dtypes[name] = _numpy_dtype(dtype.scalar)
    return known_dtypes[name]


def init_block(self, element_ty, shape):
    key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
    if key not in known_blocks:
        _init_block(self, element_ty, shape)
        known_blocks[key] = dict(vars(self))
    vars(self).update(known_blocks[key])


@functools.cache
def numel_and_shape(sizes):
    sizes = [tl.constexpr(size) for size in sizes]
    return tl.constexpr(math.prod(size.value for size in sizes)), tl.core.tuple(sizes)


def init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = numel_and_shape(tuple(type.shape) if type.is_block() else ())


def check_operands(self, lhs, rhs, *options, **named):
    """Most are float32, or a number beside one, and stay float32."""
    a, b = getattr(lhs, "dtype", None), getattr(rhs, "dtype", None)
    if named or not (tl.float32 is (a or b) is (b or a)):
        return _check_operands(self, lhs, rhs, *options, **named)
    lhs = self.scalar_constant(lhs, tl.float32) if a is None else lhs
    rhs = self.scalar_constant(rhs, tl.float32) if b is None else rhs
    return self.broadcast_impl_value(lhs, rhs)


interpreter.ScanOps.generic_scan = scan
interpreter._get_np_dtype = numpy_dtype
tl.core.block_type.__init__ = init_block
tl.core.tensor.__init__ = init_tensor
tl.core.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
Semantic.binary_op_type_checking_impl = check_operands
Semantic.scalar_constant = functools.lru_cache(4096, typed=True)(Semantic.scalar_constant)
# An overflow would be found in int64 and then, but for a debug build, not be looked at.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
