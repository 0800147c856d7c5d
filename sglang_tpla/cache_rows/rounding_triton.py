"""How kernels round: float32 cut into bfloat16 numbers, bytes and sketch codes. `sketched` is their PyTorch twin.

Import this file only where Triton runs: on a GPU, or in its interpreter.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl


@triton.jit
def upper_half(value):
    """Truncate float32 to the bits that bfloat16 holds; three such parts, each of the rest, hold the whole value."""
    return (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def byte_scale(largest):
    """Return the largest magnitude over 127, rounded up to an even bfloat16; 1 for zeros, NaN for NaN."""
    bits = tl.div_rn(largest, 127.0).to(tl.int32, bitcast=True)
    scale = ((bits + 0x1FFFF) & -131072).to(tl.float32, bitcast=True)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(largest == largest, scale, largest)  # rounding up would make -0 of a NaN with all bits set


@triton.jit
def largest_magnitude(x):
    """Return the largest magnitude of float32 values, compared as integers: a float maximum would drop NaN."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def nearest_bfloat16(value):
    """Round float32 to bfloat16, ties to even; in integers, because the interpreter's cast truncates."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def byte_codes(x, scale, at, TURN: tl.constexpr):
    """Return the codes of values: values over their scale, rounded half to even, plus 128.

    Before rounding, even columns ``at`` gain ``TURN`` and odd ones lose it.
    """
    ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    if TURN != 0.0:
        ratio += tl.where(at % 2 == 0, TURN, -TURN)
    nearest = (ratio + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 leaves no bits for a fraction
    return (tl.minimum(tl.maximum(nearest, -127.0), 127.0) + 128.0).to(tl.int32).to(tl.uint8)


@triton.jit
def load_columns(source, weight, column, there, inverse, NORMED: tl.constexpr):
    """Load some columns of one token as float32, and norm them if ``NORMED``."""
    x = tl.load(source + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    if NORMED:
        scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        x = (x * inverse * scale).to(source.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def write_field(
    target,
    source,
    weight,
    inverse,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    TURN: tl.constexpr,
    TWICE: tl.constexpr = False,
):
    """Write ``COUNT`` columns from ``FIRST`` on as bytes at ``target``, and return their scale.

    With ``TWICE``, the bytes of the opposite turn follow.
    """
    at = tl.arange(0, BLOCK)
    x = load_columns(source, weight, FIRST + at, at < COUNT, inverse, NORMED)
    scale = byte_scale(largest_magnitude(x))
    x = tl.where(at < COUNT, x, scale)  # a division with a quotient of zero would take its slow path
    tl.store(target + at, byte_codes(x, scale, at, TURN), mask=at < COUNT)
    if TWICE:
        tl.store(target + COUNT + at, byte_codes(x, scale, at, -TURN), mask=at < COUNT)
    return scale


@triton.jit
def write_sketch(
    target,
    source,
    weight,
    inverse,
    step,
    reach,
    COLUMNS: tl.constexpr,
    SKIP: tl.constexpr,
    SKIPPED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Write ``COLUMNS`` columns as sketch codes at ``target``, and return their scale.

    The ``SKIPPED`` columns from ``SKIP`` on are the row's own: they count towards the scale and are not written.
    ``BLOCK`` holds the columns that are written, ``BLOCK_ALL`` all columns.
    """
    WRITTEN: tl.constexpr = COLUMNS - SKIPPED
    TOGETHER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8  # codes that fill whole bytes
    BYTES: tl.constexpr = TOGETHER * BITS // 8
    part = tl.arange(0, BLOCK // TOGETHER)
    place = tl.arange(0, TOGETHER)
    kept = part[:, None] * TOGETHER + place[None, :]
    there = kept < WRITTEN
    x = load_columns(source, weight, kept + tl.where(kept >= SKIP, SKIPPED, 0), there, inverse, NORMED)
    every = x
    if SKIPPED:
        column = tl.arange(0, BLOCK_ALL)
        every = load_columns(source, weight, column, column < COLUMNS, inverse, NORMED)
    largest = largest_magnitude(every)
    # Divide by the largest value's power of two, so that squares neither overflow nor vanish; NaN if it is infinite.
    exponent = tl.minimum(tl.maximum(253 - (largest.to(tl.int32, bitcast=True) >> 23), 1), 252)
    factor = tl.where(largest < float("inf"), (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    relative = every * factor
    rms = tl.sqrt_rn(tl.sum(relative * relative) / COLUMNS) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    exact = tl.maximum(rms * step, tl.div_rn(largest, reach))
    exact = tl.where(rms == rms, exact, rms)  # a maximum drops NaN
    scale = nearest_bfloat16(exact)
    scale = tl.where(exact == exact, scale, exact)
    divisor = tl.where(scale > 0.0, scale, 1.0)
    x = tl.where(there, x, divisor)  # as in `write_field`
    below = tl.floor(tl.div_rn(x, tl.zeros_like(x) + divisor))  # floor, because a level is the middle of its step
    HALF_LEVELS: tl.constexpr = 1 << (BITS - 1)
    code = tl.minimum(tl.maximum(below, -HALF_LEVELS), HALF_LEVELS - 1).to(tl.int32) + HALF_LEVELS
    code = tl.where(there, code, 0)
    words = tl.sum(code << (place * BITS)[None, :], 1)
    for byte in tl.static_range(BYTES):
        position = part * BYTES + byte
        value = ((words >> (8 * byte)) & 255).to(tl.uint8)
        tl.store(target + position, value, mask=position < WRITTEN * BITS // 8)
    return scale
