"""token_weights in Triton, one launch: some bytes per row and response, where the vocabulary kernel
moves hundreds of thousands.

One program, since each weight waits for the counts of the whole call. csrc/cuda/responses.cu has
the model of what that costs. Sums have a fixed order.
"""

import triton
import triton.language as tl

from dcpo_kernels import objective as objectives
from dcpo_kernels.kernels.tiles import kernel

ONLY_TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("only-token-mean"))
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("seq-mean-token-mean"))
TOKEN_MEAN = tl.constexpr(objectives.AGGREGATIONS.index("token-mean"))
TOKEN_SUM = tl.constexpr(objectives.AGGREGATIONS.index("token-sum"))
SEQ_MEAN_TOKEN_SUM = tl.constexpr(objectives.AGGREGATIONS.index("seq-mean-token-sum"))


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
