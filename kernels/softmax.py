"""Read and write: the softmax of a row, and the gradient of its logits.

z = (x - max x) log2(e) / T throughout, up to a constant of its row or lane (exponent_of). Each lane
keeps its own running maximum and sums (online softmax, arXiv 1805.02867).
"""

import triton
import triton.language as tl

from dcpo_kernels.kernels.decide import expm1
from dcpo_kernels.kernels.softcap import cap, capped
from dcpo_kernels.kernels.tiles import (
    LANE_AXIS,
    across_lanes,
    kept_tile,
    last_tile,
    load_masked,
    max_of_lane,
    store_masked,
    store_tile,
    sum_of_lane,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum before any logit: -inf - -inf is NaN


@triton.jit
def log1p(x):
    """log(1 + x). log(s) / (s - 1) changes so slowly that its value at the rounded s = 1 + x serves
    (Kahan)."""
    sum = 1 + x
    rounded = sum - 1
    return tl.where(rounded == 0, x, tl.log(sum) * (x / rounded))


@triton.jit
def exponent_of(row_max, scale):
    """Scale and base of z = x scale - base, one fused multiply-add: base is max x log2(e) / T,
    rounded. What rounding took from it is missing in every z alike, in the maximum's own z too, and
    cancels. Where a float has no digits left for it, two logits that differ at all differ by more
    than 64 in z; a power of two makes that so, exactly and without an overflow."""
    base = row_max * scale
    far = tl.abs(base) > 2147483648.0
    exponent = row_max.to(tl.int32, bitcast=True) & 0x7F800000
    power = (-1912602624 - exponent).to(tl.float32, bitcast=True)  # 2^30 over max x's own
    return tl.where(far, power, scale), tl.where(far, row_max * power, base)


# ---- read ---------------------------------------------------------------------------------------


@triton.jit
def no_sums(LANES: tl.constexpr):
    """lane_max, sum_exp and sum_exp_z of no logits."""
    zeros = tl.zeros([LANES], tl.float32)
    return tl.full([LANES], LOWEST, tl.float32), zeros, zeros


@triton.jit
def exponentials(x, lane_max, scale):
    """Of a tile: each lane's maximum with it, z of the one before, z and 2^z of the tile."""
    x = x.to(tl.float32)
    higher = tl.maximum(lane_max, max_of_lane(x))
    # 2^-127 is as good as 0, and the clamp avoids 0 * -inf in a lane without a logit.
    old_scale, old_base = exponent_of(lane_max, scale)
    scale, base = exponent_of(higher, scale)
    shift = tl.where(old_scale == scale, tl.maximum(old_base - base, -127.0), -127.0)
    z = tl.fma(x, across_lanes(scale), -across_lanes(base))
    return higher, shift, z, tl.exp2(z)


@triton.jit
def accumulate(x, lane_max, sum_exp, sum_exp_z, scale, WITH_ENTROPY: tl.constexpr):
    """A tile of logits into each lane's maximum, sum 2^z and sum 2^z z. A NaN goes into the sums;
    the maxima ignore it."""
    lane_max, shift, z, e = exponentials(x, lane_max, scale)
    factor = tl.exp2(shift)
    if WITH_ENTROPY:
        terms = sum_of_lane(e * tl.maximum(z, -127.0))
        sum_exp_z = factor * (sum_exp_z + sum_exp * shift) + terms
    return lane_max, factor * sum_exp + sum_of_lane(e), sum_exp_z


@triton.jit
def finish_row(lane_max, sum_exp, sum_exp_z, scale):
    """Over the lanes: the maximum, log sum 2^z, and the mean of z. The 1 of the row's maximum is
    subtracted before the lanes are added up: a float32 near 1 has no digits below 6e-8, and beside
    a dominant token log p, 1 - p and the entropy depend on just those digits."""
    row_max, peak = tl.max(lane_max, 0, return_indices=True)
    lane_scale, lane_base = exponent_of(lane_max, scale)
    own = tl.fma(lane_max, lane_scale, -lane_base)  # z of each lane's maximum
    sum_exp_z = (sum_exp_z - own * sum_exp) * tl.exp2(-own)
    one = tl.where(tl.arange(0, lane_max.shape[0]) == peak, tl.exp2(own), 0.0)
    shift = tl.maximum((lane_max - row_max) * scale, -127.0)
    factor = tl.exp2(shift)
    rest = tl.sum((sum_exp - one) * tl.exp2(-own) * factor, 0)
    sum_exp *= tl.exp2(-own)
    # A lane that far below adds nothing, and its sum may be infinite: full_kl's over masked logits
    # alone.
    sum_exp_z = tl.where(shift > -127.0, factor * (sum_exp_z + sum_exp * shift), 0.0)
    mean = tl.sum(sum_exp_z, 0) / (1 + rest)
    row_max = tl.where(rest == -1, float("-inf"), row_max)  # nothing but -inf
    return row_max, log1p(rest), mean


@triton.jit
def read_row(
    x,
    lane,
    step,
    vocab,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    AGAIN: tl.constexpr,  # the row is going to be read again, its tiles should stay in L2
):
    """max x, log sum e^((x - max x) / T), the entropy, and the kept tile. Maximum and log-sum stay
    separate: their sum would lose four digits in a row shifted by 1e4. Under a softcap x is the
    capped logit, but in the kept tile."""
    POLICY: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    scale = LOG2E / temperature
    lane_max, sum_exp, sum_exp_z = no_sums(lane.shape[LANE_AXIS])
    last, kept = last_tile(vocab, BLOCK), kept_tile(vocab, BLOCK)
    for start in range(0, kept, BLOCK):
        tile = tl.load(x + start + lane + step, eviction_policy=POLICY)
        lane_max, sum_exp, sum_exp_z = accumulate(
            cap(tile, softcap), lane_max, sum_exp, sum_exp_z, scale, WITH_ENTROPY
        )
    tile = tl.zeros((lane + step).shape, x.dtype.element_ty)
    for back in range(0, last - kept + 1, BLOCK):
        tile = load_masked(x, last - back, lane, step, vocab, POLICY)
        lane_max, sum_exp, sum_exp_z = accumulate(
            cap(tile, softcap), lane_max, sum_exp, sum_exp_z, scale, WITH_ENTROPY
        )
    row_max, log_sum, mean = finish_row(lane_max, sum_exp, sum_exp_z, scale)
    entropy = log_sum - LN2 * mean if WITH_ENTROPY else 0.0
    return row_max, log_sum, entropy, tile


# ---- write --------------------------------------------------------------------------------------


@triton.jit
def probabilities(x, row_max, offset, scale):
    """offset: log2 of the row's sum of 2^z."""
    return tl.exp2((x.to(tl.float32) - row_max) * scale - offset)


@triton.jit
def gradient_of_tile(x, scale, base, a, b, softcap, WITH_ENTROPY_TERM: tl.constexpr):
    """dx = 2^z (b + a z), as terms_of has it, times the slope of a softcap."""
    x, slope = capped(x, softcap)
    z = tl.fma(x.to(tl.float32), scale, -base)
    e = tl.exp2(z)
    # the clamp avoids 0 * -inf
    entries = e * (b + a * tl.maximum(z, -127.0)) if WITH_ENTROPY_TERM else e * b
    return entries if softcap is None else entries * slope


@triton.jit
def with_target(entries, entry, column, lane, step, BLOCK: tl.constexpr):
    """Puts the target's own entry into the tile that has its column; others skip the comparison."""
    if (column >= 0) & (column < BLOCK):
        entries = tl.where(step == column - lane, entry, entries)
    return entries


@triton.jit
def gradient_at(
    x,
    is_target,
    row_max,
    log_sum,
    entropy,
    g,
    h,
    temperature,
    softcap,
    WITH_ENTROPY_TERM: tl.constexpr,
):
    """The gradient of single logits in float32. 1 - p comes from expm1: as a difference it has no
    digits left where p is near 1."""
    x, slope = capped(x, softcap)
    logprob = (x - row_max) / temperature - log_sum
    p = tl.exp(logprob)
    gradient = g * tl.where(is_target, -expm1(logprob), -p)
    if WITH_ENTROPY_TERM:
        gradient -= h * tl.where(p == 0, 0.0, p * (logprob + entropy))
    return gradient * slope / temperature


@triton.jit
def terms_of(row_max, log_sum, entropy, g, h, temperature, WITH_ENTROPY_TERM: tl.constexpr):
    """scale, base, a and b of gradient_of_tile: everything that all logits of a row have in
    common."""
    scale, base = exponent_of(row_max, LOG2E / temperature)
    shift = tl.fma(row_max, scale, -base) + log_sum * LOG2E  # log2 p = z - shift
    factor = tl.exp2(-shift) / temperature
    if WITH_ENTROPY_TERM:
        return scale, base, -h * LN2 * factor, (h * (LN2 * shift - entropy) - g) * factor
    return scale, base, 0.0, -g * factor


@triton.jit
def write_row(
    x,
    dx,  # may be x
    tile,  # its kept tile
    lane,
    step,
    vocab,
    target,
    x_target,
    row_max,
    log_sum,
    entropy,
    g,
    h,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
):
    """dx_j = 1/T [g (1[j = y] - p_j) - h p_j (log p_j + H)], formed in float32, each entry stored
    once."""
    entry = gradient_at(
        x_target, True, row_max, log_sum, entropy, g, h, temperature, softcap, WITH_ENTROPY_TERM
    )
    scale, base, a, b = terms_of(row_max, log_sum, entropy, g, h, temperature, WITH_ENTROPY_TERM)

    kept = kept_tile(vocab, BLOCK)
    entries = gradient_of_tile(tile, scale, base, a, b, softcap, WITH_ENTROPY_TERM)
    entries = with_target(entries, entry, target - kept, lane, step, BLOCK)
    store_masked(dx, entries, kept, lane, step, vocab)
    for start in range(kept + BLOCK, vocab, BLOCK):
        tail = load_masked(x, start, lane, step, vocab, "evict_first")
        entries = gradient_of_tile(tail, scale, base, a, b, softcap, WITH_ENTROPY_TERM)
        entries = with_target(entries, entry, target - start, lane, step, BLOCK)
        store_masked(dx, entries, start, lane, step, vocab)
    for done in range(0, kept, BLOCK):
        start = kept - BLOCK - done
        again = tl.load(x + start + lane + step, eviction_policy="evict_first")
        entries = gradient_of_tile(again, scale, base, a, b, softcap, WITH_ENTROPY_TERM)
        entries = with_target(entries, entry, target - start, lane, step, BLOCK)
        store_tile(dx, entries, start, lane, step)


@triton.jit
def zero_row(dx, lane, step, vocab, BLOCK: tl.constexpr):
    zeros = tl.zeros((lane + step).shape, dx.dtype.element_ty)
    last = last_tile(vocab, BLOCK)
    for start in range(0, last, BLOCK):
        store_tile(dx, zeros, start, lane, step)
    store_masked(dx, zeros, last, lane, step, vocab)
