"""Logits under a softcap (Gemma 2, arXiv 2408.00118)."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAGIC = tl.constexpr(12582912.0 + 127.0)  # 1.5 * 2^23: the sum has round(y) + 127 in its low bits


@triton.jit
def capped(x, softcap):
    """x~ = softcap tanh(x / softcap) in float32 and dx~/dx; x itself and 1 for a softcap of None.
    -inf stays what it is, a probability of 0; +inf becomes NaN.

    With E = e^(-2 |x| / softcap): tanh |x / softcap| = (1 - E) / (1 + E), dx~/dx = 4 E / (1 + E)^2.
    E = 2^n (1 + p), so E - 1 has all its digits beside E = 1 and E beside E = 0.
    """
    if softcap is None:
        return x, 1.0
    else:
        x = x.to(tl.float32)
        y = tl.maximum(tl.abs(x) * (-2 * LOG2E / softcap), -127.0)
        shifted = y + MAGIC
        power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        f = y - (shifted - MAGIC)
        # 2^f - 1: relative error 1.7e-8 on half a unit to either side, as in csrc/row.h
        p = tl.fma(f, 0.00015398397226817906, 0.0013387766666710377)
        p = tl.fma(f, p, 0.009618247859179974)
        p = tl.fma(f, p, 0.055503666400909424)
        p = tl.fma(f, p, 0.24022649228572845)
        p = tl.fma(f, p, 0.6931471824645996)
        p *= f
        e_minus_1 = tl.fma(power, p, power - 1)
        r = 1 / (2 + e_minus_1)
        slope = 4 * tl.fma(power, p, power) * r * r
        magnitude = -softcap * e_minus_1 * r
        value = tl.where(x < 0, -magnitude, magnitude) + (x - x)
        return tl.where(x == float("-inf"), x, value), slope


@triton.jit
def cap(x, softcap):
    """x~ alone."""
    value, _ = capped(x, softcap)
    return value
