"""decide in Triton, of tokens whose log-probabilities are there: one by one, or by response."""

import triton
import triton.language as tl

from dcpo_kernels.kernels.decide import (
    CLIP_NONE,
    GAMMA,
    GEOMETRIC_CLIP,
    log_ratio_part,
    rollout_weight,
)
from dcpo_kernels.kernels.decide import decide as decide_tokens
from dcpo_kernels.kernels.tiles import kernel


@triton.jit
def load_or(x, at, here, other):
    values = tl.zeros(at.shape, tl.float32) + other
    if x is not None:
        values = tl.load(x + at, mask=here, other=other)
    return values


@triton.jit
def shares(code, SURROGATE: tl.constexpr):
    """Whether a token has a share in the gradient of its response's ratio."""
    return (code == CLIP_NONE) | (SURROGATE != GEOMETRIC_CLIP)


@kernel
def decide(
    logprobs,
    entropy,
    old_logprobs,
    advantages,
    weights,
    ref_logprobs,
    importance_weights,
    log_ratio,  # that the ratio is taken from; None: logp - old_logp
    rollout_logprobs,
    entropy_weights,
    offsets,
    lengths,
    token_loss,
    ratio,
    clipped,
    g,
    h,
    rows,
    count,
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
    rollout_low,
    rollout_high,
    SURROGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    KL: tl.constexpr,
    OLD_KL: tl.constexpr,
    WITH_ENTROPY_TERM: tl.constexpr,
    WITH_PENALTY: tl.constexpr,
    SCORE_CENTERING: tl.constexpr,  # False: it takes more than a log-probability
    ROLLOUT_MODE: tl.constexpr,
    BY_RESPONSE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a response, or BLOCK rows."""
    program = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if BY_RESPONSE:
        # GSPO eq. 7: s = exp(1/n sum_t (logp_t - old_t)). The last response takes the rows after
        # it; where there is none, one of no rows takes all.
        inside = program < count
        begin = tl.load(offsets + program, mask=inside, other=0)
        end = tl.load(offsets + 1 + program, mask=inside, other=0)
        length = tl.load(lengths + program, mask=inside, other=0)
        last = tl.where(program + 1 < count, end, rows)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + columns
            live = tl.load(weights + at, mask=at < end, other=0.0) != 0
            new = tl.load(logprobs + at, mask=live, other=0.0)
            old = new if old_logprobs is None else tl.load(old_logprobs + at, mask=live, other=0.0)
            A = tl.load(advantages + at, mask=live, other=0.0)
            importance = load_or(importance_weights, at, live, 1.0)
            if rollout_logprobs is not None:
                drift = old - tl.load(rollout_logprobs + at, mask=live, other=0.0)
                importance *= rollout_weight(drift, rollout_low, rollout_high, ROLLOUT_MODE)
            part = log_ratio_part(new, old, A, importance, eps_low, eps_high, SURROGATE)
            sums += tl.where(live, part, 0.0)
        tokens = tl.maximum(length, 1).to(tl.float32)
        of_response = tl.sum(sums, 0) / (1.0 if SURROGATE == GAMMA else tokens)
        of_response += tl.zeros([BLOCK], tl.float32)
    else:
        begin = program * BLOCK
        last = tl.minimum(begin + BLOCK, rows)

    pulls = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, last, BLOCK):
        at = start + columns
        here = at < last
        weight = tl.load(weights + at, mask=here, other=0.0)
        live = weight != 0
        logprob = tl.load(logprobs + at, mask=live, other=0.0)
        old = logprob if old_logprobs is None else tl.load(old_logprobs + at, mask=live, other=0.0)
        moved = None
        if BY_RESPONSE:
            moved = of_response
        elif log_ratio is not None:
            moved = tl.load(log_ratio + at, mask=live, other=0.0)
        importance = load_or(importance_weights, at, live, 1.0)
        if rollout_logprobs is not None:
            drift = old - tl.load(rollout_logprobs + at, mask=live, other=0.0)
            importance *= rollout_weight(drift, rollout_low, rollout_high, ROLLOUT_MODE)
        entropy_weight = load_or(entropy_weights, at, live, 1.0)
        loss, slope, entropy_slope, r, code, _, through_ratio = decide_tokens(
            logprob,
            old,
            tl.load(advantages + at, mask=live, other=0.0),
            importance,
            load_or(ref_logprobs, at, live, 0.0),
            entropy_weight * load_or(entropy, at, live, 0.0),
            0.0,  # a binary divergence follows from the token
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
            moved,
        )
        tl.store(token_loss + at, tl.where(live, loss, 0.0), mask=here)
        tl.store(ratio + at, tl.where(live, r, 1.0), mask=here)
        tl.store(clipped + at, tl.where(live, code, 0).to(tl.int8), mask=here)
        if SPREAD:
            slope = tl.where(shares(code, SURROGATE), slope - through_ratio, slope)
            pulls += tl.where(live & (at < end), through_ratio * weight, 0.0)
        tl.store(g + at, tl.where(live, slope * weight, 0.0), mask=here)
        if h is not None:
            entropy_slope *= weight * entropy_weight
            tl.store(h + at, tl.where(live, entropy_slope, 0.0), mask=here)
    if SPREAD:
        # Each token's share of what pulls at the response's ratio
        share = tl.sum(pulls, 0) / tokens
        tl.debug_barrier()  # other threads may read g than wrote it
        for start in range(begin, last, BLOCK):
            at = start + columns
            here = at < last
            code = tl.load(clipped + at, mask=here, other=0)
            takes = (tl.load(weights + at, mask=here, other=0.0) != 0) & shares(code, SURROGATE)
            own = tl.load(g + at, mask=here, other=0.0)
            tl.store(g + at, own + tl.where(takes, share, 0.0), mask=here)
