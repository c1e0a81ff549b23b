"""Read, decide, write in Triton: the row kernels.

A program owns a row; the grid is a few programs per multiprocessor, and each walks down the rows
with the grid as its stride. A row is cut into tiles (tiles.py). The last full one stays in
registers from the read to the write, so a row of one tile is loaded once. All but that one are
loaded a second time, in the opposite order, out of the L2 cache (dcpo_kernels/backends/triton.py
has the sizes that make them fit).
"""

import triton.language as tl

from dcpo_kernels.kernels.decide import (
    FULL_KL,
    FULL_TV,
    TOPK_KL,
    TOPK_TV,
    decide,
    rollout_weight,
)
from dcpo_kernels.kernels.divergence import (
    MAX_K,
    centre_slopes,
    full_kl,
    full_tv,
    listed_tokens,
    store_listed,
    topk_divergence,
    topk_slopes,
    write_row_beside,
)
from dcpo_kernels.kernels.softcap import cap
from dcpo_kernels.kernels.softmax import read_row, write_row, zero_row
from dcpo_kernels.kernels.tiles import (
    assume_multiple,
    kept_tile,
    kernel,
    load_masked,
    row_of,
    target_of,
    targets_of,
    temperature_of,
    tile_columns,
)


@kernel
def fused(
    logits,
    gradient,  # may be logits; None: read and decide only
    target_ids,
    temperatures,  # None: `temperature` for all rows
    topk_ids,
    topk_logprobs,
    old_logits,
    old_logprobs,  # None: the policy's own
    advantages,
    weights,
    ref_logprobs,
    importance_weights,
    log_ratio,  # that the ratio is taken from; None: logp - old_logp
    rollout_logprobs,  # by the engine that sampled; None: no correction
    entropy_weights,  # of the entropy term, as multiples of the weight; None: 1
    token_loss,
    logprobs,
    entropies,
    ratio,
    clipped,
    has_gradient,
    rows: tl.int32,
    vocab: tl.int32,
    k: tl.int64,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    dx_batch_stride: tl.int64,
    dx_row_stride: tl.int64,
    old_batch_stride: tl.int64,
    old_row_stride: tl.int64,
    temperature: tl.float32,
    softcap,  # of the logits, before the temperature; None: there is none
    eps_low: tl.float32,
    eps_high: tl.float32,
    ratio_max: tl.float32,
    ratio_cap: tl.float32,
    floor_low: tl.float32,
    floor_high: tl.float32,
    power_low: tl.float32,
    power_high: tl.float32,
    limit_low: tl.float32,
    limit_high: tl.float32,
    kl_coef: tl.float32,
    old_kl_coef: tl.float32,
    entropy_coef: tl.float32,
    penalty_coef: tl.float32,
    rollout_low: tl.float32,
    rollout_high: tl.float32,
    SURROGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    KL: tl.constexpr,
    OLD_KL: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
    WITH_PENALTY: tl.constexpr,
    SCORE_CENTERING: tl.constexpr,
    ROLLOUT_MODE: tl.constexpr,
    ALIGNED: tl.constexpr,  # logits; the next two: gradient, old_logits
    DX_ALIGNED: tl.constexpr,
    OLD_ALIGNED: tl.constexpr,
    IS_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Read, decide, write. Memory traffic per logit in bf16: 2 bytes read and 2 written; a row
    whose gradient is 0, 2 and 2 zeros; a row that does not count, 2 zeros. A full divergence reads
    2 more of the old row."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    WITH_ENTROPY: tl.constexpr = entropies is not None
    TOPK: tl.constexpr = SCORE_CENTERING or DIVERGENCE == TOPK_TV or DIVERGENCE == TOPK_KL
    FULL: tl.constexpr = DIVERGENCE == FULL_TV or DIVERGENCE == FULL_KL
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = assume_multiple(vocab, VECTOR, IS_MULTIPLE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        loss, logprob, entropy, r, code, pulled = 0.0, 0.0, 0.0, 1.0, 0, 0
        weight = tl.load(weights + row)
        if gradient is not None:
            dx = row_of(gradient, row, per_batch, dx_batch_stride, dx_row_stride, DX_ALIGNED)
        if weight != 0:
            # Single logits are fetched before the row is reduced: the reduction has a barrier, and
            # after it the gradient may overwrite them.
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            target, x_target = target_of(x, tl.load(target_ids + row), vocab)
            if TOPK:
                ids, x_listed, old_listed, sampled, outside = listed_tokens(
                    x, topk_ids, topk_logprobs, row, k, target, vocab
                )
                x_target = tl.where(outside, float("nan"), x_target)
            T = temperature_of(temperatures, temperature, row)
            AGAIN: tl.constexpr = FULL or gradient is not None
            row_max, log_sum, entropy, kept = read_row(
                x, lane, step, vocab, T, softcap, BLOCK, WITH_ENTROPY, AGAIN
            )

            logprob = (cap(x_target, softcap) - row_max) / T - log_sum
            old = logprob if old_logprobs is None else tl.load(old_logprobs + row)
            advantage = tl.load(advantages + row)
            divergence = 0.0
            if TOPK:
                listed = (cap(x_listed, softcap) - row_max) / T - log_sum
                if SCORE_CENTERING:
                    given = tl.where(sampled, float("-inf"), listed)
                    slopes = centre_slopes(
                        given, old_listed, advantage, ratio_cap, floor_low, floor_high
                    )
                    divergence = tl.sum(tl.where(slopes == 0, 0.0, slopes * given), 0)
                else:
                    old_listed = tl.where(sampled, old, old_listed)
                    divergence = topk_divergence(listed, old_listed, DIVERGENCE)
            if FULL:
                old_x = row_of(
                    old_logits, row, per_batch, old_batch_stride, old_row_stride, OLD_ALIGNED
                )
                if DIVERGENCE == FULL_KL:
                    divergence, drift, old_max, old_log_sum = full_kl(
                        x, row_max, log_sum, old_x, lane, step, vocab, T, softcap, BLOCK
                    )
                else:
                    divergence, drift, old_max, old_log_sum = full_tv(
                        x, row_max, log_sum, old_x, lane, step, vocab, T, softcap, BLOCK
                    )
            importance = 1.0 if importance_weights is None else tl.load(importance_weights + row)
            if rollout_logprobs is not None:
                drift = old - tl.load(rollout_logprobs + row)
                importance *= rollout_weight(drift, rollout_low, rollout_high, ROLLOUT_MODE)
            entropy_weight = 1.0 if entropy_weights is None else tl.load(entropy_weights + row)
            loss, g, h, r, code, divergence_coef, _ = decide(
                logprob,
                old,
                advantage,
                importance,
                0.0 if ref_logprobs is None else tl.load(ref_logprobs + row),
                entropy_weight * entropy,
                divergence,
                eps_low,
                eps_high,
                ratio_max,
                ratio_cap,
                floor_low,
                floor_high,
                power_low,
                power_high,
                limit_low,
                limit_high,
                kl_coef,
                old_kl_coef,
                entropy_coef,
                penalty_coef,
                SURROGATE,
                DIVERGENCE,
                KL,
                OLD_KL,
                WITH_ENTROPY_TERM,
                WITH_PENALTY,
                SCORE_CENTERING,
                None if log_ratio is None else tl.load(log_ratio + row),
            )

            g *= weight
            h *= weight * entropy_weight
            divergence_coef *= weight
            pulled = ((g != 0) | (h != 0) | (divergence_coef != 0)).to(tl.int32)
            if gradient is not None:
                total = 0.0
                PULLS_TOPK: tl.constexpr = TOPK and (WITH_PENALTY or SCORE_CENTERING)
                if PULLS_TOPK:
                    if not SCORE_CENTERING:
                        slopes = topk_slopes(listed, old_listed, DIVERGENCE)
                    slopes *= divergence_coef
                    total = tl.sum(slopes, 0)
                if FULL and WITH_PENALTY:
                    write_row_beside(
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
                        divergence_coef,
                        drift,
                        T,
                        softcap,
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
                        T,
                        softcap,
                        BLOCK,
                        WITH_ENTROPY_TERM,
                    )
                if PULLS_TOPK:
                    store_listed(
                        dx,
                        ids,
                        x_listed,
                        listed,
                        slopes,
                        total,
                        target,
                        vocab,
                        row_max,
                        log_sum,
                        entropy,
                        g,
                        h,
                        T,
                        softcap,
                        WITH_ENTROPY_TERM,
                    )
        elif gradient is not None:
            zero_row(dx, lane, step, vocab, BLOCK)
        tl.store(token_loss + row, loss)
        tl.store(logprobs + row, logprob)
        if WITH_ENTROPY:
            tl.store(entropies + row, entropy)
        tl.store(ratio + row, r)
        tl.store(clipped + row, code)
        tl.store(has_gradient + row, pulled)


@kernel
def row_stats(
    logits,
    target_ids,  # [rows, k], as logprobs
    mask,  # None: every row counts
    temperatures,  # None: `temperature` for all rows
    logprobs,
    entropies,
    row_maxima,
    log_sums,
    rows: tl.int32,
    vocab: tl.int32,
    k: tl.int64,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    temperature: tl.float32,
    softcap,
    SEVERAL: tl.constexpr,  # k > 1
    ALIGNED: tl.constexpr,
    IS_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The read alone. Memory traffic per logit in bf16: 2 bytes read."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    WITH_ENTROPY: tl.constexpr = entropies is not None
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = assume_multiple(vocab, VECTOR, IS_MULTIPLE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        logprob, entropy, row_max, log_sum = 0.0, 0.0, 0.0, 0.0
        reads = True
        if mask is not None:
            reads = tl.load(mask + row) != 0
        if reads:
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            _, x_target = target_of(x, tl.load(target_ids + row * k), vocab)
            T = temperature_of(temperatures, temperature, row)
            row_max, log_sum, entropy, _ = read_row(
                x, lane, step, vocab, T, softcap, BLOCK, WITH_ENTROPY, AGAIN=False
            )
            logprob = (cap(x_target, softcap) - row_max) / T - log_sum
        tl.store(logprobs + row * k, logprob)
        if SEVERAL:
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            T = temperature_of(temperatures, temperature, row)
            for first in range(1, k, MAX_K):
                at = row * k + first + tl.arange(0, MAX_K)
                given = at < (row + 1) * k
                _, x_targets = targets_of(x, target_ids + at, given & reads, vocab)
                others = (cap(x_targets, softcap) - row_max) / T - log_sum
                others = tl.where(reads, others, 0.0)
                tl.store(logprobs + at, others, mask=given)
        if WITH_ENTROPY:
            tl.store(entropies + row, entropy)
        tl.store(row_maxima + row, row_max)
        tl.store(log_sums + row, log_sum)


@kernel
def row_gradient(
    logits,
    gradient,  # may be logits
    target_ids,  # [rows, k], as gs
    temperatures,  # None: `temperature` for all rows
    row_maxima,
    log_sums,
    entropies,
    gs,
    hs,  # None: no entropy term
    factor,  # of the whole gradient, read where it lies; None: 1
    rows: tl.int32,
    vocab: tl.int32,
    k: tl.int64,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    dx_batch_stride: tl.int64,
    dx_row_stride: tl.int64,
    temperature: tl.float32,
    softcap,
    SEVERAL: tl.constexpr,  # k > 1
    ALIGNED: tl.constexpr,
    DX_ALIGNED: tl.constexpr,
    IS_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The write alone. Memory traffic per logit in bf16: 2 bytes read and 2 written; where g and h
    are 0, 2 zeros."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = assume_multiple(vocab, VECTOR, IS_MULTIPLE)
    factor = 1.0 if factor is None else tl.load(factor).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        g = tl.load(gs + row * k)
        pulls = g
        if SEVERAL:
            at = row * k + tl.arange(0, MAX_K)
            given = at < (row + 1) * k
            g_targets = tl.load(gs + at, mask=given, other=0.0)
            g, pulls = tl.sum(g_targets, 0), tl.sum(tl.abs(g_targets), 0)
        h, entropy = 0.0, 0.0
        if hs is not None:
            h = tl.load(hs + row)
            entropy = tl.load(entropies + row)
        dx = row_of(gradient, row, per_batch, dx_batch_stride, dx_row_stride, DX_ALIGNED)
        if (pulls == 0) & (h == 0):
            zero_row(dx, lane, step, vocab, BLOCK)
        else:
            x = row_of(logits, row, per_batch, batch_stride, row_stride, ALIGNED)
            target, x_target = target_of(x, tl.load(target_ids + row * k), vocab)
            g = tl.where(x_target == x_target, g, x_target)  # NaN for an id outside
            if SEVERAL:
                ids, x_targets = targets_of(x, target_ids + at, given, vocab)
                outside = given & (x_targets != x_targets)
                g = tl.where(tl.sum(outside.to(tl.int32), 0) > 0, float("nan"), g)
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
                g * factor,
                h * factor,
                temperature_of(temperatures, temperature, row),
                softcap,
                BLOCK,
                hs is not None,
            )
            if SEVERAL:  # an id that comes more than once has the sum of its g
                own = tl.zeros([MAX_K], tl.float32)
                others = own + tl.where(g == g, 0.0, g)
                for i in range(k):
                    same = ids == tl.load(target_ids + row * k + i)
                    g_i = tl.load(gs + row * k + i)
                    own += tl.where(same, g_i, 0.0)
                    others += tl.where(same, 0.0, g_i)
                row_max, log_sum = tl.load(row_maxima + row), tl.load(log_sums + row)
                T = temperature_of(temperatures, temperature, row)
                store_listed(
                    dx,
                    ids,
                    x_targets,
                    (cap(x_targets, softcap) - row_max) / T - log_sum,
                    0.0,
                    others * factor,
                    ids,
                    vocab,
                    row_max,
                    log_sum,
                    entropy,
                    own * factor,
                    h * factor,
                    T,
                    softcap,
                    hs is not None,
                )


@kernel
def multiply_(
    x,
    factor,
    rows: tl.int32,
    vocab: tl.int32,
    per_batch: tl.int32,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ALIGNED: tl.constexpr,
    IS_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """x *= factor in place, nothing for a factor of 1, which is read where it lies."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    lane, step = tile_columns(BLOCK, LANES, VECTOR)
    vocab = assume_multiple(vocab, VECTOR, IS_MULTIPLE)
    factor = tl.load(factor).to(tl.float32)
    if factor != 1:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            row_x = row_of(x, row, per_batch, batch_stride, row_stride, ALIGNED)
            for start in range(0, vocab, BLOCK):
                at = row_x + start + lane + step
                here = step < vocab - start - lane
                tile = tl.load(at, mask=here, other=0.0).to(tl.float32)
                tl.store(at, (tile * factor).to(x.dtype.element_ty), mask=here)
