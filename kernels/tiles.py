"""How the kernels walk over a row: in tiles of BLOCK logits.

A tile has three axes, BLOCK / (LANES VECTOR), LANES and VECTOR: a lane is a thread, a vector 16
bytes. Only the lanes cross threads. So what a lane adds up needs no barrier, and a row is reduced
over the lanes once, in a fixed order.
"""

import inspect

import triton
import triton.language as tl
from torch.torch_version import TorchVersion

# Threads must run along the lane axis. Triton >= 3.7 gives them the last non-contiguous axis, older
# versions the first.
LANE_AXIS = tl.constexpr(0 if TorchVersion(triton.__version__) < (3, 7) else 1)


def kernel(function):
    """triton.jit that specializes on constexprs and dtypes, never on a value: a 1 or a multiple of
    16 compiles nothing new. What a layout allows is said by the constexprs ALIGNED and
    IS_MULTIPLE."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


@triton.jit
def row_of(x, row, per_batch, batch_stride, row_stride, ALIGNED: tl.constexpr):
    """Pointer to the first logit of a row (backends/layout.py), 64-bit: a batch may have more than
    2^31 logits. ALIGNED: every row begins on 16 bytes."""
    batch, place = (row // per_batch).to(tl.int64), (row % per_batch).to(tl.int64)
    pointer = x + (batch * batch_stride + place * row_stride)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def assume_multiple(vocab, VECTOR: tl.constexpr, IS_MULTIPLE: tl.constexpr):
    """The vocabulary's size; IS_MULTIPLE: the compiler learns that it is a multiple of VECTOR."""
    return vocab // VECTOR * VECTOR if IS_MULTIPLE else vocab


@triton.jit
def across_lanes(x):
    """[LANES], as one axis of a tile."""
    return x[None, :, None] if LANE_AXIS == 1 else x[:, None, None]


@triton.jit
def sum_of_lane(x):
    return tl.sum(tl.sum(x, 2), 1 - LANE_AXIS)


@triton.jit
def max_of_lane(x):
    return tl.max(tl.max(x, 2), 1 - LANE_AXIS)


@triton.jit
def tile_columns(BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile in two parts: where a lane begins, and the steps from there along the other
    axes, which are constants to a thread. Keep the parts separate: their precomputed sum costs one
    register per element and spills."""
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
    """First column of the last full tile (or of the only one), which stays in registers. It and a
    partial tile after it are loaded with a mask, all others without."""
    return tl.maximum(last_tile(vocab, BLOCK) - BLOCK, 0)


@triton.jit
def load_masked(x, start, lane, step, vocab, POLICY: tl.constexpr):
    """-inf past the row's end."""
    here = step < vocab - start - lane
    return tl.load(x + start + lane + step, mask=here, other=float("-inf"), eviction_policy=POLICY)


@triton.jit
def store_tile(dx, entries, start, lane, step):
    entries = entries.to(dx.dtype.element_ty)
    tl.store(dx + start + lane + step, entries, eviction_policy="evict_first")


@triton.jit
def store_masked(dx, entries, start, lane, step, vocab):
    here = step < vocab - start - lane
    entries = entries.to(dx.dtype.element_ty)
    tl.store(dx + start + lane + step, entries, mask=here, eviction_policy="evict_first")


@triton.jit
def temperature_of(temperatures, temperature, row):
    """Temperatures per row are checked on a CPU only: one that is not > 0 makes its row NaN."""
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        temperature = tl.where(temperature > 0, temperature, float("nan"))
    return temperature


@triton.jit
def target_of(x, target, vocab):
    """The target's column and logit: 0 and NaN for an id outside the vocabulary, so that the row's
    loss and gradient are NaN and nothing is read out of bounds."""
    valid = (target >= 0) & (target < vocab)
    target = tl.where(valid, target, 0).to(tl.int32)
    return target, tl.load(x + target, mask=valid, other=float("nan")).to(tl.float32)


@triton.jit
def targets_of(x, target_ids, given, vocab):
    """The same of several: their ids, -1 where none is given, and logits."""
    ids = tl.load(target_ids, mask=given, other=-1)
    inside = (ids >= 0) & (ids < vocab)
    return ids, tl.load(x + ids, mask=inside, other=float("nan")).to(tl.float32)
