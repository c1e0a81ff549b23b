"""finish in Triton: the loss, the mean of each response, and the numbers of `summarize`, which one
program adds up in a fixed order."""

import triton
import triton.language as tl

from dcpo_kernels.kernels.decide import CLIP_CAP, CLIP_HIGH, CLIP_LOW, CLIP_REGION
from dcpo_kernels.kernels.tiles import kernel


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
