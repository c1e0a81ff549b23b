"""Read, decide, write in Triton: the row kernels.

A program owns a row; the grid is a few programs per multiprocessor, and each walks down the rows
with the grid as its stride. A row is cut into tiles of BLOCK logits. The last full one stays in
registers from the read to the write, so a row of one tile is loaded once. That one and what follows
are masked with -inf, the tiles before it are swept without a mask. All but the kept one are loaded
a second time, in the opposite order, out of the L2 cache (dcpo_kernels/backends/triton.py has the
sizes that make them fit).

A tile has three axes, BLOCK / (LANES VECTOR), LANES and VECTOR: a lane is a thread, a vector 16
bytes. Only the lanes cross threads. So a lane keeps its own running maximum and sum (online
softmax, arXiv 1805.02867), a sweep has no barrier, and the row is reduced over the lanes once, in a
fixed order.
"""

import inspect

import triton
import triton.language as tl
from torch.torch_version import TorchVersion

from dcpo_kernels import objective as objectives
from dcpo_kernels.kernels.objective import (
    FULL_KL,
    FULL_TV,
    TOPK_KL,
    TOPK_TV,
    decide,
    expm1,
    log1p,
    sign,
    topk_divergence,
    topk_slopes,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum before any logit: -inf - -inf is NaN
MAX_K = tl.constexpr(objectives.MAX_K)
# Which axis of a tile is the lanes. Triton lays the threads along the last of several axes without
# neighbours in memory; until 3.6 along the first.
LANE_AXIS = tl.constexpr(0 if TorchVersion(triton.__version__) < (3, 7) else 1)


def kernel(function):
    """triton.jit that compiles for a constexpr or a dtype, and never for a value: not for a 1, not
    for a multiple of 16. What the layout allows is said by the constexprs ALIGNED and WHOLE."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


# ---- where things lie ---------------------------------------------------------------------------


@triton.jit
def row_of(x, row, per_batch, batch_stride, row_stride, ALIGNED: tl.constexpr):
    """Pointer to the first logit of a row (backends/layout.py), 64-bit: a batch may have more than
    2^31 logits. ALIGNED: every row begins on 16 bytes."""
    batch, place = (row // per_batch).to(tl.int64), (row % per_batch).to(tl.int64)
    pointer = x + (batch * batch_stride + place * row_stride)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def whole(vocab, VECTOR: tl.constexpr, WHOLE: tl.constexpr):
    """The vocabulary's size; WHOLE: it is a multiple of VECTOR, and the compiler learns so."""
    return vocab // VECTOR * VECTOR if WHOLE else vocab


@triton.jit
def across_lanes(x):
    """[LANES], as one axis of a tile."""
    return x[None, :, None] if LANE_AXIS == 1 else x[:, None, None]


@triton.jit
def tile_columns(BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile in two parts: where a lane begins, and the steps from there along the other
    axes, which are constants to a thread. Added up before they are used as offsets or compared,
    they would be a register an element, and spill."""
    lane = across_lanes(tl.arange(0, LANES)) * VECTOR
    vector = tl.arange(0, BLOCK // (LANES * VECTOR)) * (LANES * VECTOR)
    vector = vector[:, None, None] if LANE_AXIS == 1 else vector[None, :, None]
    return lane, vector + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def last_tile(vocab, BLOCK: tl.constexpr):
    """First column of the last tile, which is never empty."""
    return (vocab - 1) // BLOCK * BLOCK


@triton.jit
def kept_tile(vocab, BLOCK: tl.constexpr):
    """First column of the tile that stays in registers, the last full one. It and at most one more
    are masked."""
    return tl.maximum(last_tile(vocab, BLOCK) - BLOCK, 0)


@triton.jit
def load_masked(x, start, lane, step, vocab, POLICY: tl.constexpr):
    """-inf past the row's end."""
    here = step < vocab - start - lane
    return tl.load(x + start + lane + step, mask=here, other=float("-inf"), eviction_policy=POLICY)


@triton.jit
def store_masked(dx, entries, start, lane, step, vocab):
    here = step < vocab - start - lane
    tl.store(
        dx + start + lane + step,
        entries.to(dx.dtype.element_ty),
        mask=here,
        eviction_policy="evict_first",
    )


@triton.jit
def target_of(x, target, vocab):
    """The target's column and logit: 0 and NaN for an id outside the vocabulary, so that the row's
    loss and gradient are NaN and nothing is read out of bounds."""
    valid = (target >= 0) & (target < vocab)
    target = tl.where(valid, target, 0).to(tl.int32)
    return target, tl.load(x + target, mask=valid, other=float("nan")).to(tl.float32)


# ---- read ---------------------------------------------------------------------------------------


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 1 - LANE_AXIS)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 1 - LANE_AXIS)


@triton.jit
def accumulate(x, most, total, weighted, scale, WITH_ENTROPY: tl.constexpr):
    """A tile of logits into each lane's max, sum e^(z - max) and sum e^(z - max) (z - max) / ln 2.
    A NaN goes into the sums; the maxima ignore it."""
    x = x.to(tl.float32)
    higher = tl.maximum(most, lane_max(x))
    # 2^-127 is as good as 0; held there, the -inf of a lane without a logit meets no 0.
    shift = tl.maximum((most - higher) * scale, -127.0)
    factor = tl.exp2(shift)
    y = (x - across_lanes(higher)) * scale
    e = tl.exp2(y)
    if WITH_ENTROPY:
        weighted = factor * (weighted + total * shift) + lane_sum(e * tl.maximum(y, -127.0))
    return higher, factor * total + lane_sum(e), weighted


@triton.jit
def finish_row(most, total, weighted, scale):
    """Over the lanes: the maximum, log sum, and the mean weight. The 1 of the row's maximum leaves
    its lane before the lanes are added up: a float32 near 1 has no digits below 6e-8, and what
    stands beside a peak is all that its log p is made of."""
    row_max, peak = tl.max(most, 0, return_indices=True)
    shift = tl.maximum((most - row_max) * scale, -127.0)
    factor = tl.exp2(shift)
    rest = tl.sum(total * factor - tl.where(tl.arange(0, most.shape[0]) == peak, 1.0, 0.0), 0)
    # A lane that far below counts for nothing, and may hold anything: in full_kl an infinite sum,
    # of masked logits alone.
    weighted = tl.where(shift > -127.0, factor * (weighted + total * shift), 0.0)
    mean = tl.sum(weighted, 0) / (1 + rest)
    row_max = tl.where(rest == -1, float("-inf"), row_max)  # nothing but -inf
    return row_max, log1p(rest), mean


@triton.jit
def read_row(
    x,
    lane,
    step,
    vocab,
    temperature,
    BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    AGAIN: tl.constexpr,  # the row is going to be read again, its tiles should stay in L2
):
    """max x, log sum e^((x - max x) / T), the entropy, and the kept tile. Maximum and log-sum stay
    apart: added up, a row shifted by 1e4 would lose four digits."""
    LANES: tl.constexpr = lane.shape[LANE_AXIS]
    POLICY: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    scale = LOG2E / temperature
    most = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    last, kept = last_tile(vocab, BLOCK), kept_tile(vocab, BLOCK)
    for start in range(0, kept, BLOCK):
        tile = tl.load(x + start + lane + step, eviction_policy=POLICY)
        most, total, weighted = accumulate(tile, most, total, weighted, scale, WITH_ENTROPY)
    tile = tl.zeros((lane + step).shape, x.dtype.element_ty)
    for back in range(0, last - kept + 1, BLOCK):
        tile = load_masked(x, last - back, lane, step, vocab, POLICY)
        most, total, weighted = accumulate(tile, most, total, weighted, scale, WITH_ENTROPY)

    row_max, log_sum, mean = finish_row(most, total, weighted, scale)
    entropy = log_sum - LN2 * mean if WITH_ENTROPY else 0.0
    return row_max, log_sum, entropy, tile


# ---- write --------------------------------------------------------------------------------------


@triton.jit
def gradient_of_tile(
    x, is_target, entry, row_max, offset, scale, a, b, WITH_ENTROPY_TERM: tl.constexpr
):
    y = (x.to(tl.float32) - row_max) * scale - offset  # log2 p
    p = tl.exp2(y)
    # dx = p (b + a log2 p); held at -127, a p of 0 meets no -inf
    tile = p * (b + a * tl.maximum(y, -127.0)) if WITH_ENTROPY_TERM else p * b
    return tl.where(is_target, entry, tile)


@triton.jit
def gradient_at(
    x, is_target, row_max, log_sum, entropy, g, h, temperature, WITH_ENTROPY_TERM: tl.constexpr
):
    """Of single logits, before it is rounded. 1 - p from expm1: nothing is left of it in float32
    where p is near 1."""
    logprob = (x - row_max) / temperature - log_sum
    p = tl.exp(logprob)
    gradient = g * tl.where(is_target, -expm1(logprob), -p)
    if WITH_ENTROPY_TERM:
        gradient -= h * tl.where(p == 0, 0.0, p * (logprob + entropy))
    return gradient / temperature


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
    BLOCK: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
):
    """dx_j = 1/T [g (1[j = y] - p_j) - h p_j (log p_j + H)], formed in float32, each entry stored
    once."""
    scale = LOG2E / temperature
    offset = log_sum * LOG2E
    entry = gradient_at(
        x_target, True, row_max, log_sum, entropy, g, h, temperature, WITH_ENTROPY_TERM
    )
    a = 0.0
    b = -g / temperature
    if WITH_ENTROPY_TERM:
        a = -h * LN2 / temperature
        b -= h * entropy / temperature

    kept = kept_tile(vocab, BLOCK)
    entries = gradient_of_tile(
        tile, step == target - kept - lane, entry, row_max, offset, scale, a, b, WITH_ENTROPY_TERM
    )
    store_masked(dx, entries, kept, lane, step, vocab)
    for start in range(kept + BLOCK, vocab, BLOCK):
        tail = load_masked(x, start, lane, step, vocab, "evict_first")
        entries = gradient_of_tile(
            tail,
            step == target - start - lane,
            entry,
            row_max,
            offset,
            scale,
            a,
            b,
            WITH_ENTROPY_TERM,
        )
        store_masked(dx, entries, start, lane, step, vocab)
    for done in range(0, kept, BLOCK):
        start = kept - BLOCK - done
        again = tl.load(x + start + lane + step, eviction_policy="evict_first")
        entries = gradient_of_tile(
            again,
            step == target - start - lane,
            entry,
            row_max,
            offset,
            scale,
            a,
            b,
            WITH_ENTROPY_TERM,
        )
        tl.store(
            dx + start + lane + step, entries.to(dx.dtype.element_ty), eviction_policy="evict_first"
        )


@triton.jit
def zero_row(dx, lane, step, vocab, BLOCK: tl.constexpr):
    zeros = tl.zeros((lane + step).shape, dx.dtype.element_ty)
    last = last_tile(vocab, BLOCK)
    for start in range(0, last, BLOCK):
        tl.store(dx + start + lane + step, zeros, eviction_policy="evict_first")
    store_masked(dx, zeros, last, lane, step, vocab)


# ---- divergence from the whole row of another policy --------------------------------------------


@triton.jit
def full_kl(
    x,
    tile,  # its kept tile
    row_max,
    log_sum,
    old_x,
    lane,
    step,
    vocab,
    temperature,
    BLOCK: tl.constexpr,
):
    """KL(q || p) over the vocabulary (DPPO section 4) while the row of old logits is read: the mean
    of log q - log p under q. Also the maximum and log-sum of that row."""
    LANES: tl.constexpr = lane.shape[LANE_AXIS]
    scale = LOG2E / temperature
    most = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    kept = kept_tile(vocab, BLOCK)
    old = load_masked(old_x, kept, lane, step, vocab, "evict_first")
    most, total, weighted = accumulate_beside(old, tile, row_max, most, total, weighted, scale)
    for start in range(kept + BLOCK, vocab, BLOCK):
        tail = load_masked(x, start, lane, step, vocab, "evict_last")
        old = load_masked(old_x, start, lane, step, vocab, "evict_first")
        most, total, weighted = accumulate_beside(old, tail, row_max, most, total, weighted, scale)
    for done in range(0, kept, BLOCK):
        at = kept - BLOCK - done + lane + step
        tile = tl.load(x + at, eviction_policy="evict_last")
        old = tl.load(old_x + at, eviction_policy="evict_first")
        most, total, weighted = accumulate_beside(old, tile, row_max, most, total, weighted, scale)
    old_max, old_log_sum, mean = finish_row(most, total, weighted, scale)
    return LN2 * mean - old_log_sum + log_sum, old_max, old_log_sum


@triton.jit
def accumulate_beside(old, x, row_max, most, total, weighted, scale):
    """`accumulate` of a tile of old logits, with log2 q - log2 p (less what is constant) as the
    weight."""
    old = old.to(tl.float32)
    higher = tl.maximum(most, lane_max(old))
    shift = tl.maximum((most - higher) * scale, -127.0)
    factor = tl.exp2(shift)
    y = (old - across_lanes(higher)) * scale
    e = tl.exp2(y)
    distance = y - (x.to(tl.float32) - row_max) * scale
    terms = tl.where(e == 0, 0.0, e * distance)  # 0 (-inf + inf) is NaN
    # What was infinite of masked logits alone counts for nothing beside the first one that was not.
    weighted = tl.where(shift > -127.0, factor * (weighted + total * shift), 0.0) + lane_sum(terms)
    return higher, factor * total + lane_sum(e), weighted


@triton.jit
def tv_of_tile(x, old, row_max, offset, old_max, old_offset, scale):
    """Each lane's part of sum |p - q| and of sum sign(p - q) p."""
    p = tl.exp2((x.to(tl.float32) - row_max) * scale - offset)
    q = tl.exp2((old.to(tl.float32) - old_max) * scale - old_offset)
    return lane_sum(tl.abs(p - q)), lane_sum(p * sign(p - q))


@triton.jit
def full_tv(
    x,
    tile,  # its kept tile
    row_max,
    log_sum,
    old_x,
    old,
    old_max,
    old_log_sum,
    lane,
    step,
    vocab,
    temperature,
    BLOCK: tl.constexpr,
):
    """TV over the vocabulary (DPPO section 4), once both rows were read; and, for its gradient,
    sum sign(p - q) p."""
    scale = LOG2E / temperature
    offset = log_sum * LOG2E
    old_offset = old_log_sum * LOG2E
    kept = kept_tile(vocab, BLOCK)
    parts, drifts = tv_of_tile(tile, old, row_max, offset, old_max, old_offset, scale)
    for start in range(kept + BLOCK, vocab, BLOCK):
        tile = load_masked(x, start, lane, step, vocab, "evict_last")
        old = load_masked(old_x, start, lane, step, vocab, "evict_first")
        part, drift = tv_of_tile(tile, old, row_max, offset, old_max, old_offset, scale)
        parts += part
        drifts += drift
    for done in range(0, kept, BLOCK):
        at = kept - BLOCK - done + lane + step
        tile = tl.load(x + at, eviction_policy="evict_last")
        old = tl.load(old_x + at, eviction_policy="evict_first")
        part, drift = tv_of_tile(tile, old, row_max, offset, old_max, old_offset, scale)
        parts += part
        drifts += drift
    return 0.5 * tl.sum(parts, 0), tl.sum(drifts, 0)


@triton.jit
def pulled_gradient_of_tile(
    x,
    old,
    is_target,
    entry,
    row_max,
    offset,
    old_max,
    old_offset,
    scale,
    a,
    b,
    pull,
    drift,
    DIVERGENCE: tl.constexpr,
):
    """gradient_of_tile, and pull times the divergence's gradient: p - q of KL, p (sign(p - q) -
    drift) / 2 of TV."""
    log_p = (x.to(tl.float32) - row_max) * scale - offset
    p = tl.exp2(log_p)
    q = tl.exp2((old.to(tl.float32) - old_max) * scale - old_offset)
    tile = tl.where(is_target, entry, p * (b + a * tl.maximum(log_p, -127.0)))
    if DIVERGENCE == FULL_TV:
        return tile + 0.5 * pull * p * (sign(p - q) - drift)
    return tile + pull * (p - q)


@triton.jit
def write_pulled_row(
    x,
    dx,  # may be x
    old_x,
    lane,
    step,
    vocab,
    target,
    x_target,
    row_max,
    log_sum,
    old_max,
    old_log_sum,
    entropy,
    g,
    h,
    pull,
    drift,
    temperature,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """write_row for a row that a penalty on a full divergence pulls at."""
    scale = LOG2E / temperature
    offset = log_sum * LOG2E
    old_offset = old_log_sum * LOG2E
    entry = gradient_at(x_target, True, row_max, log_sum, entropy, g, h, temperature, True)
    a = -h * LN2 / temperature
    b = -(g + h * entropy) / temperature
    pull /= temperature

    last = last_tile(vocab, BLOCK)
    for done in range(0, last + 1, BLOCK):
        start = last - done
        entries = pulled_gradient_of_tile(
            load_masked(x, start, lane, step, vocab, "evict_first"),
            load_masked(old_x, start, lane, step, vocab, "evict_first"),
            step == target - start - lane,
            entry,
            row_max,
            offset,
            old_max,
            old_offset,
            scale,
            a,
            b,
            pull,
            drift,
            DIVERGENCE,
        )
        store_masked(dx, entries, start, lane, step, vocab)


# ---- the kernels --------------------------------------------------------------------------------


@kernel
def fused(
    logits,
    gradient,  # may be logits; None: read and decide only
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
    rows: tl.int32,
    vocab: tl.int32,
    k: tl.int64,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    gradient_batch_stride: tl.int64,
    gradient_row_stride: tl.int64,
    old_batch_stride: tl.int64,
    old_row_stride: tl.int64,
    temperature: tl.float32,
    eps_low: tl.float32,
    eps_high: tl.float32,
    ratio_max: tl.float32,
    ratio_cap: tl.float32,
    limit_low: tl.float32,
    limit_high: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    penalty_coef: tl.float32,
    SURROGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
    WITH_PENALTY: tl.constexpr,
    SKIP_ZERO_ADVANTAGE: tl.constexpr,
    ALIGNED: tl.constexpr,  # logits; the next two: gradient, old_logits
    GRADIENT_ALIGNED: tl.constexpr,
    OLD_ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Read, decide, write. Memory traffic a logit in bf16: 2 bytes read and 2 written; a row whose
    gradient is 0, 2 and 2 zeros; a row that does not count, 2 zeros. A full divergence reads 2 more
    of the old row."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    WITH_ENTROPY: tl.constexpr = entropies is not None
    TOPK: tl.constexpr = DIVERGENCE == TOPK_TV or DIVERGENCE == TOPK_KL
    FULL: tl.constexpr = DIVERGENCE == FULL_TV or DIVERGENCE == FULL_KL
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = whole(vocab, VECTOR, WHOLE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        weight = tl.load(weights + row)
        advantage = tl.load(advantages + row)
        reads = weight != 0
        if SKIP_ZERO_ADVANTAGE and not (WITH_KL or (WITH_ENTROPY_TERM or WITH_PENALTY)):
            reads = reads & (advantage != 0)
        if reads:
            # Single logits are fetched before the row is reduced: the reduction has a barrier, and
            # after it the gradient may overwrite them.
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            target, x_target = target_of(x, tl.load(target_ids + row), vocab)
            if TOPK:
                places = tl.arange(0, 2 * MAX_K)
                given = places < k
                at = row * k + places
                ids = tl.load(topk_ids + at, mask=given, other=-1)
                # the sampled token takes the next place, unless it is listed
                sampled = (places == k) & (tl.sum((ids == target).to(tl.int32), 0) == 0)
                inside = (ids >= 0) & (ids < vocab)
                outside = tl.sum((given & ~inside).to(tl.int32), 0) > 0
                x_target = tl.where(outside, float("nan"), x_target)
                x_listed = tl.load(x + ids, mask=inside, other=float("-inf")).to(tl.float32)
                x_listed = tl.where(sampled, x_target, x_listed)

            row_max, log_sum, entropy, kept = read_row(
                x,
                lane,
                step,
                vocab,
                temperature,
                BLOCK,
                WITH_ENTROPY,
                AGAIN=FULL or gradient is not None,
            )

            logprob = (x_target - row_max) / temperature - log_sum
            old_logprob = tl.load(old_logprobs + row)
            importance = 1.0
            if importance_weights is not None:
                importance = tl.load(importance_weights + row)
            ref_logprob = 0.0
            if ref_logprobs is not None:
                ref_logprob = tl.load(ref_logprobs + row)
            divergence = 0.0
            if TOPK:
                new = (x_listed - row_max) / temperature - log_sum
                old = tl.load(topk_logprobs + at, mask=given, other=float("-inf"))
                old = tl.where(sampled, old_logprob, old)
                divergence = topk_divergence(new, old, DIVERGENCE)
            if FULL:
                old_x = row_of(
                    old_logits, row, per_batch, old_batch_stride, old_row_stride, OLD_ALIGNED
                )
                drift = 0.0
                if DIVERGENCE == FULL_KL:
                    divergence, old_max, old_log_sum = full_kl(
                        x, kept, row_max, log_sum, old_x, lane, step, vocab, temperature, BLOCK
                    )
                else:
                    old_max, old_log_sum, _, old_kept = read_row(
                        old_x, lane, step, vocab, temperature, BLOCK, WITH_ENTROPY=False, AGAIN=True
                    )
                    divergence, drift = full_tv(
                        x,
                        kept,
                        row_max,
                        log_sum,
                        old_x,
                        old_kept,
                        old_max,
                        old_log_sum,
                        lane,
                        step,
                        vocab,
                        temperature,
                        BLOCK,
                    )
            loss, g, h, r, code, pull = decide(
                logprob,
                old_logprob,
                advantage,
                importance,
                ref_logprob,
                entropy,
                divergence,
                eps_low,
                eps_high,
                ratio_max,
                ratio_cap,
                limit_low,
                limit_high,
                kl_coef,
                entropy_coef,
                penalty_coef,
                SURROGATE,
                DIVERGENCE,
                WITH_KL,
                WITH_ENTROPY_TERM,
                WITH_PENALTY,
            )
            tl.store(token_loss + row, loss)
            tl.store(logprobs + row, logprob)
            if WITH_ENTROPY:
                tl.store(entropies + row, entropy)
            tl.store(ratio + row, r)
            tl.store(clipped + row, code)

            if gradient is not None:
                dx = row_of(
                    gradient,
                    row,
                    per_batch,
                    gradient_batch_stride,
                    gradient_row_stride,
                    GRADIENT_ALIGNED,
                )
                g *= weight
                h *= weight
                pull *= weight
                total = 0.0
                if TOPK and WITH_PENALTY:
                    slopes = pull * topk_slopes(new, old, DIVERGENCE)
                    total = tl.sum(slopes, 0)
                if FULL and WITH_PENALTY:
                    write_pulled_row(
                        x,
                        dx,
                        old_x,
                        lane,
                        step,
                        vocab,
                        target,
                        x_target,
                        row_max,
                        log_sum,
                        old_max,
                        old_log_sum,
                        entropy,
                        g,
                        h,
                        pull,
                        drift,
                        temperature,
                        BLOCK,
                        DIVERGENCE,
                    )
                elif (g + total == 0) & (h == 0):
                    zero_row(dx, lane, step, vocab, BLOCK)
                else:
                    write_row(
                        x,
                        dx,
                        kept,
                        lane,
                        step,
                        vocab,
                        target,
                        x_target,
                        row_max,
                        log_sum,
                        entropy,
                        g + total,
                        h,
                        temperature,
                        BLOCK,
                        WITH_ENTROPY_TERM,
                    )
                if TOPK and WITH_PENALTY:
                    # The listed logits again, from where they were fetched.
                    tl.debug_barrier()
                    ids = tl.where(sampled, target, ids)
                    entries = gradient_at(
                        x_listed,
                        ids == target,
                        row_max,
                        log_sum,
                        entropy,
                        g,
                        h,
                        temperature,
                        WITH_ENTROPY_TERM,
                    )
                    entries += (slopes - tl.exp(new) * total) / temperature
                    inside = (ids >= 0) & (ids < vocab)
                    tl.store(dx + ids, entries.to(dx.dtype.element_ty), mask=inside)
        else:
            tl.store(token_loss + row, 0.0)
            tl.store(logprobs + row, 0.0)
            if WITH_ENTROPY:
                tl.store(entropies + row, 0.0)
            tl.store(ratio + row, 1.0)
            tl.store(clipped + row, 0)
            if gradient is not None:
                dx = row_of(
                    gradient,
                    row,
                    per_batch,
                    gradient_batch_stride,
                    gradient_row_stride,
                    GRADIENT_ALIGNED,
                )
                zero_row(dx, lane, step, vocab, BLOCK)


@kernel
def row_stats(
    logits,
    target_ids,
    counts,  # None: every row counts
    logprobs,
    entropies,
    row_maxima,
    log_sums,
    rows: tl.int32,
    vocab: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    temperature: tl.float32,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The read alone. Memory traffic a logit in bf16: 2 bytes read."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    WITH_ENTROPY: tl.constexpr = entropies is not None
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = whole(vocab, VECTOR, WHOLE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        logprob, entropy, row_max, log_sum = 0.0, 0.0, 0.0, 0.0
        reads = True
        if counts is not None:
            reads = tl.load(counts + row) != 0
        if reads:
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            _, x_target = target_of(x, tl.load(target_ids + row), vocab)
            row_max, log_sum, entropy, _ = read_row(
                x, lane, step, vocab, temperature, BLOCK, WITH_ENTROPY, AGAIN=False
            )
            logprob = (x_target - row_max) / temperature - log_sum
        tl.store(logprobs + row, logprob)
        if WITH_ENTROPY:
            tl.store(entropies + row, entropy)
        tl.store(row_maxima + row, row_max)
        tl.store(log_sums + row, log_sum)


@kernel
def row_gradient(
    logits,
    gradient,  # may be logits
    target_ids,
    row_maxima,
    log_sums,
    entropies,
    gs,
    hs,  # None: no entropy term
    rows: tl.int32,
    vocab: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    gradient_batch_stride: tl.int64,
    gradient_row_stride: tl.int64,
    temperature: tl.float32,
    ALIGNED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The write alone. Memory traffic a logit in bf16: 2 bytes read and 2 written; where g and h
    are 0, 2 zeros."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = whole(vocab, VECTOR, WHOLE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        g = tl.load(gs + row)
        h, entropy = 0.0, 0.0
        if hs is not None:
            h = tl.load(hs + row)
            entropy = tl.load(entropies + row)
        dx = row_of(
            gradient,
            row,
            per_batch,
            gradient_batch_stride,
            gradient_row_stride,
            GRADIENT_ALIGNED,
        )
        if (g == 0) & (h == 0):
            zero_row(dx, lane, step, vocab, BLOCK)
        else:
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            target, x_target = target_of(x, tl.load(target_ids + row), vocab)
            g = tl.where(x_target == x_target, g, x_target)  # NaN for an id outside
            # No thread may overwrite the target's logit before all have it.
            tl.debug_barrier()
            write_row(
                x,
                dx,
                load_masked(x, kept_tile(vocab, BLOCK), lane, step, vocab, "evict_first"),
                lane,
                step,
                vocab,
                target,
                x_target,
                tl.load(row_maxima + row),
                tl.load(log_sums + row),
                entropy,
                g,
                h,
                temperature,
                BLOCK,
                hs is not None,
            )


@kernel
def scale(
    x,
    factor,
    rows: tl.int32,
    vocab: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """x *= factor in place, nothing for a factor of 1, which is read where it lies."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = whole(vocab, VECTOR, WHOLE)
    factor = tl.load(factor).to(tl.float32)
    if factor != 1:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            row_x = row_of(x, row, per_batch, batch_stride, row_stride, ALIGNED)
            for start in range(0, vocab, BLOCK):
                at = row_x + start + lane + step
                here = step < vocab - start - lane
                tile = tl.load(at, mask=here, other=0.0).to(tl.float32)
                tl.store(at, (tile * factor).to(x.dtype.element_ty), mask=here)
