"""Divergences over more than the sampled token (DPPO section 4): a top-K list, or a whole row of
old logits. Their part of the read, and their gradient where they are a penalty."""

import triton
import triton.language as tl

from dcpo_kernels import objective as objectives
from dcpo_kernels.kernels.decide import (
    FULL_TV,
    MAX_LOG_RATIO,
    MIN_REST,
    TOPK_TV,
    cut_weight,
    sign,
)
from dcpo_kernels.kernels.softcap import cap, capped
from dcpo_kernels.kernels.softmax import (
    LN2,
    LOG2E,
    exponentials,
    finish_row,
    gradient_at,
    gradient_of_tile,
    no_sums,
    probabilities,
    read_row,
    terms_of,
    with_target,
)
from dcpo_kernels.kernels.tiles import LANE_AXIS, last_tile, load_masked, store_masked, sum_of_lane

MAX_K = tl.constexpr(objectives.MAX_K)
MIN_CENTRE_REST = tl.constexpr(objectives.MIN_CENTRE_REST)

# ---- over listed tokens -------------------------------------------------------------------------


@triton.jit
def listed_tokens(x, topk_ids, topk_logprobs, row, k, target, vocab):
    """[2 MAX_K]: ids, logits and old log-probs of the K tokens given, -inf where there is none;
    `sampled` is true in the next place, which the sampled token takes unless it is listed (its old
    log-prob is not filled in). Last, whether a given id is outside the vocabulary."""
    places = tl.arange(0, 2 * MAX_K)
    given = places < k
    ids = tl.load(topk_ids + row * k + places, mask=given, other=-1)
    sampled = (places == k) & (tl.sum((ids == target).to(tl.int32), 0) == 0)
    ids = tl.where(sampled, target, ids)
    inside = (ids >= 0) & (ids < vocab)
    outside = tl.sum((given & ~inside).to(tl.int32), 0) > 0
    logits = tl.load(x + ids, mask=inside, other=float("-inf")).to(tl.float32)
    old = tl.load(topk_logprobs + row * k + places, mask=given, other=float("-inf"))
    return ids, logits, old, sampled, outside


@triton.jit
def topk_divergence(logprobs, old_logprobs, DIVERGENCE: tl.constexpr):
    """Over listed tokens [K], -inf where there is none, and one bucket for the rest (DPPO section
    4.2)."""
    p, q = tl.exp(logprobs), tl.exp(old_logprobs)
    rest_p = tl.maximum(1 - tl.sum(p, 0), MIN_REST)
    rest_q = tl.maximum(1 - tl.sum(q, 0), MIN_REST)
    if DIVERGENCE == TOPK_TV:
        return 0.5 * (tl.sum(tl.abs(p - q), 0) + tl.abs(rest_p - rest_q))
    inside = tl.where(q > 0, q * (old_logprobs - logprobs), 0.0)
    return tl.sum(inside, 0) + rest_q * (tl.log(rest_q) - tl.log(rest_p))


@triton.jit
def topk_slopes(logprobs, old_logprobs, DIVERGENCE: tl.constexpr):
    """e [K]: the divergence's gradient is e - p sum(e) in a listed logit and -p sum(e) in any
    other, over T."""
    p, q = tl.exp(logprobs), tl.exp(old_logprobs)
    rest_p = 1 - tl.sum(p, 0)
    rest_q = tl.maximum(1 - tl.sum(q, 0), MIN_REST)
    clamped = rest_p < MIN_REST
    if DIVERGENCE == TOPK_TV:
        return 0.5 * p * (sign(p - q) - tl.where(clamped, 0.0, sign(rest_p - rest_q)))
    return tl.where(clamped, 0.0, p * rest_q / rest_p) - q


@triton.jit
def centre_slopes(logprobs, old_logprobs, A, ratio_cap, floor_low, floor_high):
    """[K]: what log p of listed tokens is multiplied with in the centre, q f(p/q) - alpha p (arXiv
    2609.20807); alpha is of the bucket for the rest. 0 where both are -inf."""
    p, q, log_ratio = tl.exp(logprobs), tl.exp(old_logprobs), logprobs - old_logprobs
    rest_p = tl.maximum(1 - tl.sum(p, 0), MIN_CENTRE_REST)
    rest_q = tl.maximum(1 - tl.sum(q, 0), MIN_CENTRE_REST)
    alpha = rest_q / rest_p * cut_weight(A, rest_p / rest_q, ratio_cap, floor_low, floor_high)
    none = (q == 0) | (tl.abs(log_ratio) > MAX_LOG_RATIO)  # a sampled token would have no gradient
    weights = cut_weight(A, tl.exp(log_ratio), ratio_cap, floor_low, floor_high)
    return tl.where(none, 0.0, q * weights) - alpha * p


@triton.jit
def store_listed(
    dx,
    ids,
    logits,
    logprobs,
    slopes,  # times dloss/ddivergence, or that of the centre
    total,  # their sum, which write_row was given as a part of g
    target,
    vocab,
    row_max,
    log_sum,
    entropy,
    g,
    h,
    temperature,
    softcap,
    WITH_ENTROPY_TERM: tl.constexpr,
):
    """The listed entries once more, from logits that were fetched before the row was written."""
    tl.debug_barrier()
    is_target = ids == target
    entries = gradient_at(
        logits, is_target, row_max, log_sum, entropy, g, h, temperature, softcap, WITH_ENTROPY_TERM
    )
    _, slope = capped(logits, softcap)
    entries += (slopes - tl.exp(logprobs) * total) * slope / temperature
    inside = (ids >= 0) & (ids < vocab)
    tl.store(dx + ids, entries.to(dx.dtype.element_ty), mask=inside)


# ---- over the vocabulary ------------------------------------------------------------------------


@triton.jit
def accumulate_kl(old, x, row_max, lane_max, sum_exp, sum_exp_z, scale):
    """`accumulate` of a tile of old logits, with log2 q - log2 p (up to a constant) in the place of
    z."""
    lane_max, shift, z, e = exponentials(old, lane_max, scale)
    distance = z - (x.to(tl.float32) - row_max) * scale
    terms = sum_of_lane(tl.where(e == 0, 0.0, e * distance))  # 0 (-inf + inf) is NaN
    factor = tl.exp2(shift)
    # The sum over masked logits alone may be infinite; it is dropped at the first other logit.
    sum_exp_z = tl.where(shift > -127.0, factor * (sum_exp_z + sum_exp * shift), 0.0) + terms
    return lane_max, factor * sum_exp + sum_of_lane(e), sum_exp_z


@triton.jit
def full_kl(
    x, row_max, log_sum, old_x, lane, step, vocab, temperature, softcap, BLOCK: tl.constexpr
):
    """KL(q || p) while the row of old logits is read: the mean of log q - log p under q. Also a 0
    for full_tv's drift, and the maximum and log-sum of the old row."""
    scale = LOG2E / temperature
    lane_max, sum_exp, sum_exp_z = no_sums(lane.shape[LANE_AXIS])
    last = last_tile(vocab, BLOCK)
    for done in range(0, last + 1, BLOCK):
        tile = cap(load_masked(x, last - done, lane, step, vocab, "evict_last"), softcap)
        old = cap(load_masked(old_x, last - done, lane, step, vocab, "evict_first"), softcap)
        lane_max, sum_exp, sum_exp_z = accumulate_kl(
            old, tile, row_max, lane_max, sum_exp, sum_exp_z, scale
        )
    old_max, old_log_sum, mean = finish_row(lane_max, sum_exp, sum_exp_z, scale)
    return LN2 * mean - old_log_sum + log_sum, 0.0, old_max, old_log_sum


@triton.jit
def full_tv(
    x, row_max, log_sum, old_x, lane, step, vocab, temperature, softcap, BLOCK: tl.constexpr
):
    """TV, once the old row was read; for its gradient the drift, sum sign(p - q) p; and the
    maximum and log-sum of the old row."""
    old_max, old_log_sum, _, _ = read_row(
        old_x, lane, step, vocab, temperature, softcap, BLOCK, WITH_ENTROPY=False, AGAIN=True
    )
    scale, offset, old_offset = LOG2E / temperature, log_sum * LOG2E, old_log_sum * LOG2E
    parts = tl.zeros([lane.shape[LANE_AXIS]], tl.float32)
    drifts = parts
    last = last_tile(vocab, BLOCK)
    for done in range(0, last + 1, BLOCK):
        tile = cap(load_masked(x, last - done, lane, step, vocab, "evict_last"), softcap)
        old = cap(load_masked(old_x, last - done, lane, step, vocab, "evict_first"), softcap)
        p = probabilities(tile, row_max, offset, scale)
        q = probabilities(old, old_max, old_offset, scale)
        parts += sum_of_lane(tl.abs(p - q))
        drifts += sum_of_lane(p * sign(p - q))
    return 0.5 * tl.sum(parts, 0), tl.sum(drifts, 0), old_max, old_log_sum


@triton.jit
def write_row_beside(
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
    divergence_coef,
    drift,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """write_row for a row with a penalty on a full divergence."""
    scale, offset, old_offset = LOG2E / temperature, log_sum * LOG2E, old_log_sum * LOG2E
    entry = gradient_at(x_target, True, row_max, log_sum, entropy, g, h, temperature, softcap, True)
    z_scale, base, a, b = terms_of(row_max, log_sum, entropy, g, h, temperature, True)
    last = last_tile(vocab, BLOCK)
    for done in range(0, last + 1, BLOCK):
        start = last - done
        tile = load_masked(x, start, lane, step, vocab, "evict_first")
        old = load_masked(old_x, start, lane, step, vocab, "evict_first")
        entries = gradient_of_tile(tile, z_scale, base, a, b, softcap, True)
        entries = with_target(entries, entry, target - start, lane, step, BLOCK)
        tile, slope = capped(tile, softcap)
        p = probabilities(tile, row_max, offset, scale)
        q = probabilities(cap(old, softcap), old_max, old_offset, scale)
        slopes = 0.5 * p * (sign(p - q) - drift) if DIVERGENCE == FULL_TV else p - q
        entries += divergence_coef / temperature * slopes * slope
        store_masked(dx, entries, start, lane, step, vocab)
