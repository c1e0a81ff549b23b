"""Triton's interpreter, made to round like a GPU and to take a third of its time. Imported by
conftest.py where TRITON_INTERPRET=1, before anything runs in it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch = interpreter._patch_lang


def convert(values, from_dtype, to_dtype, rounding_mode):
    """To bfloat16 it truncates (3.7 to 3.9), and where it rounds a carry goes missing."""
    if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
        return (values.astype(np.uint32) << 16).view(np.float32)
    if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(values, from_dtype, to_dtype, rounding_mode)


class Patched:
    """triton.language for the time of a launch. The interpreter would patch it anew for every call
    of a device function."""

    scopes: ClassVar[dict[frozenset[int], Any]] = {}  # modules that are patched, and their undoing

    def __init__(self, function):
        self.launch = not self.scopes
        modules = (v for v in function.__globals__.values() if v is tl or v is tl.core)
        names = frozenset(map(id, modules))
        if names not in self.scopes:
            self.scopes[names] = _patch(function)

    def restore(self):
        while self.launch and self.scopes:
            self.scopes.popitem()[1].restore()


class InPlace(interpreter.GridExecutor):
    """Everything here is on the CPU and written where it lies; copying it onto itself would touch
    gigabytes that a test has only reserved."""

    def _restore_args_dev(self, *_):
        pass


def fma(self, x, y, z):
    """Rounded once: the interpreter rounds the product too."""
    with np.errstate(invalid="ignore"):
        exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)


interpreter.GridExecutor = InPlace
interpreter.InterpreterBuilder.create_fma = fma
interpreter._convert_float = convert
interpreter._patch_lang = Patched
