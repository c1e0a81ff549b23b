"""The operators around the vocabulary kernel in Triton, one launch each. They move some bytes per
row and response; the vocabulary kernel moves hundreds of thousands per row.

token_weights is one program, since each weight waits for the counts of the whole call; so is the
summary of finish. csrc/cuda/responses.cu has the model of what that costs. Sums have a fixed order.
"""

import triton
import triton.language as tl

from dcpo_kernels import objective as objectives
from dcpo_kernels.kernels.decide import (
    CLIP_CAP,
    CLIP_HIGH,
    CLIP_LOW,
    CLIP_NONE,
    CLIP_REGION,
    GAMMA,
    GEOMETRIC_CLIP,
    log_ratio_part,
    rollout_weight,
)
from dcpo_kernels.kernels.decide import decide as decide_tokens
from dcpo_kernels.kernels.tiles import kernel

ONLY_TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("only-token-mean"))
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("seq-mean-token-mean"))
TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("token-mean"))
TOKEN_SUM = tl.constexpr(objectives.AGGREGATIONS.index("token-sum"))
SEQ_MEAN_TOKEN_SUM = tl.constexpr(objectives.AGGREGATIONS.index("seq-mean-token-sum"))

# ---- token_weights ------------------------------------------------------------------------------


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def lay_out(lengths, offsets, rows, count, BLOCK: tl.constexpr):
    """Sets the offsets; they never fall and never leave the rows, whatever the lengths are: the sum
    of those may wrap."""
    tl.store(offsets, rows * 0)
    before = rows * 0
    end = rows * 0
    for start in range(0, count, BLOCK):
        responses = start + tl.arange(0, BLOCK)
        inside = responses < count
        if lengths is None:
            length = tl.where(inside, rows // count, 0)
        else:
            length = tl.load(lengths + responses, mask=inside, other=0)
        sums = before + tl.cumsum(length, 0)
        before += tl.sum(length, 0)
        ends = tl.minimum(tl.maximum(sums, 0), rows)
        ends = tl.maximum(tl.associative_scan(ends, 0, larger), end)
        end = tl.max(ends, 0)
        tl.store(offsets + 1 + responses, ends, mask=inside)
    return end


@triton.jit
def begins_and_ends(offsets, responses, count):
    inside = responses < count
    begin = tl.load(offsets + responses, mask=inside, other=0)
    return begin, tl.load(offsets + 1 + responses, mask=inside, other=0)


@triton.jit
def count_tokens(mask, rows, here):
    """Which of a tile of rows count."""
    if mask is not None:
        here = tl.load(mask + rows, mask=here, other=0) != 0
    return here


@triton.jit
def live_rows(skip_zero, responses, rows, counted, BY_RESPONSE: tl.constexpr):
    """Those of the rows that count which skip_zero leaves to be read."""
    if skip_zero is not None:
        at = tl.broadcast_to(responses[:, None], rows.shape) if BY_RESPONSE else rows
        counted = tl.load(skip_zero + at, mask=counted, other=0.0) != 0
    return counted


@triton.jit
def total(given, on_device, counted):
    """Of the whole batch; NaN if it is not > 0 or smaller than what is counted in this call."""
    here = counted.to(tl.float32)
    whole = here
    if on_device is not None:
        whole = tl.load(on_device)
    elif given is not None:
        whole = given
    return tl.where((whole > 0) & (whole >= here), whole, float("nan"))


@triton.jit
def token_weight(lengths, responses, tokens, max_length, AGGREGATION: tl.constexpr):
    """Of each token of responses of these lengths (dcpo_kernels/responses.py)."""
    n = lengths.to(tl.float32)
    if AGGREGATION == ONLY_TOKEN_MEAN:
        parts = n
    elif AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        parts = responses * n
    elif AGGREGATION == TOKEN_MEAN:
        parts = n * 0 + tokens
    elif AGGREGATION == TOKEN_SUM:
        parts = n * 0 + 1
    elif AGGREGATION == SEQ_MEAN_TOKEN_SUM:
        parts = n * 0 + responses
    else:
        parts = n * 0 + responses * max_length
    weight = tl.where(n > 0, tl.div_rn(n * 0 + 1, tl.where(n > 0, parts, 1.0)), 0.0)
    return tl.where(n < 0, float("nan"), weight)


@triton.jit
def spread_value(value, spread, responses, rows, here, count):
    if value is not None:
        x = tl.load(value + responses, mask=responses < count, other=0.0)
        tl.store(spread + rows, tl.broadcast_to(x[:, None], rows.shape), mask=here)


@triton.jit
def spread_rest(value, spread, rows, here, count):
    """Rows after the last response have its value."""
    if value is not None:
        x = tl.load(value + tl.maximum(count - 1, 0), mask=count > 0, other=0.0)
        tl.store(spread + rows, tl.zeros(rows.shape, tl.float32) + x, mask=here)


@kernel
def token_weights(
    mask,
    lengths,
    response_lengths,  # tokens of the whole response; None: all of them are here
    given_weights,  # in the place of the aggregation's
    num_responses,
    num_tokens,
    max_length,
    num_responses_on_device,
    num_tokens_on_device,
    max_length_on_device,
    skip_zero,
    weights,
    token_mask,
    offsets,
    token_counts,
    value_0,
    value_1,
    value_2,
    value_3,
    spread_0,
    spread_1,
    spread_2,
    spread_3,
    rows,
    count,
    AGGREGATION: tl.constexpr,
    SKIP_BY_RESPONSE: tl.constexpr,
    SKIP_WHOLE_RESPONSES: tl.constexpr,
    RESPONSES: tl.constexpr,  # of a tile, which has BLOCK rows
    BLOCK: tl.constexpr,
):
    rows = rows.to(tl.int64)
    count = count.to(tl.int64)
    COLUMNS: tl.constexpr = BLOCK // RESPONSES
    columns = tl.arange(0, COLUMNS)[None, :]
    last = lay_out(lengths, offsets, rows, count, BLOCK)
    tl.debug_barrier()  # other threads read the offsets than wrote them

    responses_here = rows * 0
    tokens_here = rows * 0
    longest_here = rows * 0
    for first in range(0, count, RESPONSES):
        responses = first + tl.arange(0, RESPONSES)
        begin, end = begins_and_ends(offsets, responses, count)
        n = end - begin
        if mask is not None:
            longest = tl.max(n, 0)
            n = n * 0
            for start in range(0, longest, COLUMNS):
                at = begin[:, None] + start + columns
                n += tl.sum(count_tokens(mask, at, at < end[:, None]).to(tl.int64), 1)
        if response_lengths is not None:  # -1 where they can't be
            whole = tl.load(response_lengths + responses, mask=responses < count, other=0)
            n = tl.where(whole >= n, whole, -1)
        tl.store(token_counts + responses, n, mask=responses < count)
        responses_here += tl.sum((n > 0).to(tl.int64), 0)
        tokens_here += tl.sum(n, 0)
        longest_here = tl.maximum(longest_here, tl.max(n, 0))
    all_responses = total(num_responses, num_responses_on_device, responses_here)
    all_tokens = total(num_tokens, num_tokens_on_device, tokens_here)
    all_lengths = total(max_length, max_length_on_device, longest_here)
    tl.debug_barrier()

    for first in range(0, count, RESPONSES):
        responses = first + tl.arange(0, RESPONSES)
        begin, end = begins_and_ends(offsets, responses, count)
        longest = tl.max(end - begin, 0)
        n = tl.load(token_counts + responses, mask=responses < count, other=0)
        weight = token_weight(n, all_responses, all_tokens, all_lengths, AGGREGATION)
        if SKIP_WHOLE_RESPONSES:
            any_live = tl.zeros([RESPONSES], tl.int32)
            for start in range(0, longest, COLUMNS):
                at = begin[:, None] + start + columns
                live = count_tokens(mask, at, at < end[:, None])
                live = live_rows(skip_zero, responses, at, live, SKIP_BY_RESPONSE)
                any_live = tl.maximum(any_live, tl.max(live.to(tl.int32), 1))
            weight = tl.where(any_live > 0, weight, 0.0)
        for start in range(0, longest, COLUMNS):
            at = begin[:, None] + start + columns
            here = at < end[:, None]
            counted = count_tokens(mask, at, here)
            tl.store(token_mask + at, counted.to(tl.uint8), mask=here)
            if not SKIP_WHOLE_RESPONSES:
                counted = live_rows(skip_zero, responses, at, counted, SKIP_BY_RESPONSE)
            value = tl.broadcast_to(weight[:, None], at.shape)
            if given_weights is not None:
                value = tl.load(given_weights + at, mask=counted, other=0.0)
                if SKIP_WHOLE_RESPONSES:
                    counted = counted & (any_live > 0)[:, None]
            tl.store(weights + at, tl.where(counted, value, 0.0), mask=here)
            spread_value(value_0, spread_0, responses, at, here, count)
            spread_value(value_1, spread_1, responses, at, here, count)
            spread_value(value_2, spread_2, responses, at, here, count)
            spread_value(value_3, spread_3, responses, at, here, count)

    for start in range(last, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < rows
        tl.store(weights + at, tl.zeros([BLOCK], tl.float32), mask=here)
        tl.store(token_mask + at, tl.zeros([BLOCK], tl.uint8), mask=here)
        spread_rest(value_0, spread_0, at, here, count)
        spread_rest(value_1, spread_1, at, here, count)
        spread_rest(value_2, spread_2, at, here, count)
        spread_rest(value_3, spread_3, at, here, count)


# ---- decide -------------------------------------------------------------------------------------


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


# ---- finish -------------------------------------------------------------------------------------


@triton.jit
def lowest(x):
    """NaN where one is, which tl.min need not say."""
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.min(x, 0))


@triton.jit
def count_code(codes, code, live):
    return tl.where(live & (codes == code), 1.0, 0.0)


@triton.jit
def summarize(
    token_loss,
    logprobs,
    entropy,
    ratio,
    clipped,
    weights,
    mask,
    loss,
    summary,
    rows,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK], tl.float32)
    losses, reads, log_sum = nothing, nothing, nothing
    entropies, ratios, kl = nothing, nothing, nothing
    high, low, cap, region, tokens = nothing, nothing, nothing, nothing, nothing
    smallest = nothing + float("inf")
    largest = nothing - float("inf")
    for start in range(0, rows, BLOCK):
        at = start + columns
        here = at < rows
        weight = tl.load(weights + at, mask=here, other=0.0)
        live = weight != 0
        tokens += tl.load(mask + at, mask=here, other=0).to(tl.float32)
        r = tl.load(ratio + at, mask=live, other=1.0)
        code = tl.load(clipped + at, mask=live, other=0)
        losses += tl.where(live, weight * tl.load(token_loss + at, mask=live, other=0.0), 0.0)
        reads += tl.where(live, 1.0, 0.0)
        log_sum += tl.load(logprobs + at, mask=live, other=0.0)
        if entropy is not None:
            entropies += tl.load(entropy + at, mask=live, other=0.0)
        ratios += tl.where(live, r, 0.0)
        kl += (r - 1) - tl.log(r)
        smallest = tl.where(live & ((r < smallest) | (r != r)), r, smallest)
        largest = tl.where(live & ((r > largest) | (r != r)), r, largest)
        high += count_code(code, CLIP_HIGH, live)
        low += count_code(code, CLIP_LOW, live)
        cap += count_code(code, CLIP_CAP, live)
        region += count_code(code, CLIP_REGION, live)
    read = tl.sum(reads, 0)
    all_loss = tl.sum(losses, 0)
    tl.store(loss, all_loss)
    tl.store(summary, all_loss)  # in the order of metrics.py: Summary
    tl.store(summary + 1, tl.sum(tokens, 0))
    tl.store(summary + 2, read)
    tl.store(summary + 3, tl.sum(log_sum, 0))
    tl.store(summary + 4, tl.sum(entropies, 0))
    tl.store(summary + 5, tl.sum(ratios, 0))
    tl.store(summary + 6, tl.where(read > 0, lowest(smallest), 1.0))
    tl.store(summary + 7, tl.where(read > 0, -lowest(-largest), 1.0))
    tl.store(summary + 8, tl.sum(kl, 0))
    tl.store(summary + 9, tl.sum(high, 0))
    tl.store(summary + 10, tl.sum(low, 0))
    tl.store(summary + 11, tl.sum(cap, 0))
    tl.store(summary + 12, tl.sum(region, 0))
    tl.store(summary + 13, 0.0)  # tokens dropped: who asked for it knows it


@kernel
def finish(
    token_loss,
    logprobs,
    entropy,
    ratio,
    clipped,
    weights,
    mask,
    offsets,
    lengths,
    loss,
    response_loss,
    summary,
    rows,
    BLOCK: tl.constexpr,
):
    """The first program has the summary, each other one a response."""
    rows = rows.to(tl.int64)
    response = tl.program_id(0).to(tl.int64) - 1
    if response < 0:
        summarize(
            token_loss,
            logprobs,
            entropy,
            ratio,
            clipped,
            weights,
            mask,
            loss,
            summary,
            rows,
            BLOCK,
        )
    else:
        end = tl.load(offsets + 1 + response)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.load(offsets + response), end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            sums += tl.load(token_loss + at, mask=at < end, other=0.0)
        length = tl.maximum(tl.load(lengths + response), 1).to(tl.float32)
        tl.store(response_loss + response, tl.sum(sums, 0) / length)
