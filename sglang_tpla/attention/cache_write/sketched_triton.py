"""The Triton kernel behind `cache_write.sketched`. Import it only where Triton runs: on a GPU, or in its interpreter.

Grid: [blocks of tokens, blocks of projected columns, blocks of query heads]. A program of columns writes its part of
the projection to a workspace and counts itself; the last one for its tokens finds the scales and writes the rows. So
many programs share the projection although a scale belongs to a whole row.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.attention.cache_write.plain_triton import rotate_queries, rotated_pairs, slice_columns


@triton.jit
def int8_scale(largest):
    """The largest magnitude over 127, rounded up to bfloat16; 1 for zeros."""
    bits = tl.div_rn(largest, 127.0).to(tl.int32, bitcast=True)
    scale = ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def nearest_bfloat16(value):
    """Round float32 to bfloat16, ties to even; in integers, because the interpreter's cast truncates."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def int8_codes(x, scale, at, TURN: tl.constexpr):
    """Values over their scale, plus ``TURN`` in even columns ``at`` and minus it in odd ones, rounded half to even."""
    ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    if TURN != 0.0:
        ratio += tl.where(at % 2 == 0, TURN, -TURN)
    nearest = (ratio + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 leaves no bits for a fraction
    return tl.minimum(tl.maximum(nearest, -127.0), 127.0).to(tl.int8).to(tl.uint8, bitcast=True)


@triton.jit
def quantised_field(row, columns, first, COUNT: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr):
    """Quantise ``COUNT`` columns from ``first`` on into the same place of the row, and return their scale."""
    at = tl.arange(0, BLOCK)
    x = tl.load(columns + first + at, mask=at < COUNT, other=0.0, cache_modifier=".cg")
    scale = int8_scale(tl.max(tl.abs(x), 0))
    tl.store(row + first + at, int8_codes(x, scale, at, TURN), mask=at < COUNT)
    return scale


@triton.jit
def write_sketch(
    row,
    columns,
    midpoints,
    factor,
    OWN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Write the codes of the other groups' columns at ``row``, and return the scale that all groups share."""
    kept = tl.arange(0, BLOCK_SKETCH)
    there = kept < (GROUPS - 1) * OWN
    source = kept + tl.where(kept >= GROUP * OWN, OWN, 0)
    x = tl.load(columns + source, mask=there, other=0.0, cache_modifier=".cg")
    at = tl.arange(0, BLOCK_OWN)
    mine = tl.load(columns + GROUP * OWN + at, mask=at < OWN, other=0.0, cache_modifier=".cg")
    largest = tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(mine), 0))
    unit = tl.where(largest > 0.0, largest, 1.0)
    a = tl.div_rn(x, tl.zeros_like(x) + unit)
    b = tl.div_rn(mine, tl.zeros_like(mine) + unit)
    rms = largest * tl.sqrt_rn((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (GROUPS * OWN))
    scale = nearest_bfloat16(tl.minimum(rms * factor, 3.3895313892515355e38))
    divisor = tl.where(scale > 0.0, scale, 1.0)
    magnitude = tl.div_rn(tl.abs(x), tl.zeros_like(x) + divisor)
    code = tl.where(x < 0.0, 1 << (BITS - 1), 0)
    for level in tl.static_range((1 << (BITS - 1)) - 1):
        code += (magnitude >= tl.load(midpoints + level)).to(tl.int32)
    code = tl.where(there, code, 0)
    eights = tl.reshape(code, [BLOCK_SKETCH // 8, 8])
    place = tl.arange(0, 8)
    words = tl.sum(eights << (place * BITS)[None, :], 1)  # eight codes are BITS bytes
    group = tl.arange(0, BLOCK_SKETCH // 8)
    for byte in tl.static_range(BITS):
        position = group * BITS + byte
        value = ((words >> (8 * byte)) & 255).to(tl.uint8)
        tl.store(row + position, value, mask=position < (GROUPS - 1) * OWN * BITS // 8)
    return scale


@triton.jit
def write_row(
    row,
    row16,
    columns,
    key,
    cos_sin,
    positions,
    midpoints,
    token,
    factor,
    SHARED: tl.constexpr,
    OWN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    W_PAD: tl.constexpr,
    SCALES: tl.constexpr,
    TURN: tl.constexpr,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
):
    """Write one token's row from its projected ``columns``; ``row16`` is the row in units of bfloat16."""
    SKETCH: tl.constexpr = W_PAD + ROPE * ROPE_BITS // 8
    SKETCH_BYTES: tl.constexpr = (GROUPS - 1) * OWN * BITS // 8
    shared_scale = 1.0
    own_scale = 1.0
    sketch_scale = 1.0
    rope_scale = 1.0
    if SHARED:
        shared_scale = quantised_field(row, columns, 0, SHARED, BLOCK_SHARED, TURN)
    if OWN:
        own_scale = quantised_field(row, columns, SHARED, OWN, BLOCK_OWN, 0.0)
        sketch_scale = write_sketch(
            row + SKETCH, columns + SHARED + OWN, midpoints, factor, OWN, GROUPS, GROUP, BITS, BLOCK_SKETCH, BLOCK_OWN
        )  # fmt: skip
    few = tl.arange(0, 16)
    tl.store(row + SHARED + OWN + few, tl.zeros([16], tl.uint8), mask=few < W_PAD - SHARED - OWN)
    behind = SKETCH + SKETCH_BYTES
    tl.store(row + behind + few, tl.zeros([16], tl.uint8), mask=few < SCALES - behind)
    if ROPE:
        one = tl.zeros([1], tl.int64)
        even, odd, a, b, whole = rotated_pairs(key + one, cos_sin, positions, token + one, one == 0, ROPE, ROTATE, HALF)
        if ROPE_BITS == 8:
            even, odd = tl.where(whole, even.to(tl.float32), 0.0), tl.where(whole, odd.to(tl.float32), 0.0)
            rope_scale = int8_scale(tl.maximum(tl.max(tl.abs(even)), tl.max(tl.abs(odd))))
            tl.store(
                row + W_PAD + a[None, :] + one[:, None], int8_codes(even, rope_scale, a[None, :], TURN), mask=whole
            )
            tl.store(row + W_PAD + b[None, :] + one[:, None], int8_codes(odd, rope_scale, b[None, :], TURN), mask=whole)
        else:
            tl.store(row16 + W_PAD // 2 + a[None, :] + one[:, None], even.to(tl.bfloat16), mask=whole)
            tl.store(row16 + W_PAD // 2 + b[None, :] + one[:, None], odd.to(tl.bfloat16), mask=whole)
    tl.store(row16 + SCALES // 2, shared_scale.to(tl.bfloat16))
    tl.store(row16 + SCALES // 2 + 1, own_scale.to(tl.bfloat16))
    tl.store(row16 + SCALES // 2 + 2, sketch_scale.to(tl.bfloat16))
    tl.store(row16 + SCALES // 2 + 3, rope_scale.to(tl.bfloat16))


@triton.jit(do_not_specialize=["tokens"])
def sketched_write_kernel(
    latent,  # [tokens, D], rows latent_stride apart
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    q_rope,  # [tokens, HEADS, ROPE], rotated in place; unread where HEADS is 0
    weight,  # [D]
    z,  # [D, COLUMNS] float32, contiguous
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    cache,  # [slots, row bytes] uint8, rows cache_stride apart
    cache16,  # the same in units of bfloat16
    work,  # [tokens, COLUMNS] float32
    arrived,  # [blocks of tokens] int32, zeros before and after
    midpoints,  # [2^(BITS-1) - 1] float32
    latent_stride,
    rope_stride,
    q_token_stride,
    q_head_stride,
    cache_stride,
    tokens,
    eps,
    factor,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    OWN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    W_PAD: tl.constexpr,
    SCALES: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
):
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_TOKENS
    if block < COLUMN_BLOCKS:
        token = first + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        column = block * BLOCK_W + tl.arange(0, BLOCK_W)
        raw = latent + token * latent_stride
        value = slice_columns(raw, weight, z, live, column, eps, D, COLUMNS, MODE, BLOCK_TOKENS, BLOCK_W, BLOCK_D)
        there = live[:, None] & (column < COLUMNS)[None, :]
        tl.store(work + token[:, None] * COLUMNS + column[None, :], value, mask=there)
        tl.debug_barrier()  # every thread must have stored before one of them counts
        before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
        if before == COLUMN_BLOCKS - 1:
            tl.debug_barrier()
            tl.store(arrived + tl.program_id(0), 0)
            for index in range(BLOCK_TOKENS):
                one = (first + index).to(tl.int64)
                if one < tokens:
                    at = tl.load(slots + one).to(tl.int64) * cache_stride
                    write_row(
                        cache + at, cache16 + at // 2, work + one * COLUMNS, k_rope + one * rope_stride, cos_sin,
                        positions, midpoints, one, factor, SHARED, OWN, GROUPS, GROUP, BITS, ROPE, ROPE_BITS, W_PAD,
                        SCALES, TURN, ROTATE, HALF, BLOCK_SHARED, BLOCK_OWN, BLOCK_SKETCH,
                    )  # fmt: skip
    elif HEADS:
        rotate_queries(
            q_rope, cos_sin, positions, block - COLUMN_BLOCKS, tokens, q_token_stride, q_head_stride,
            HEADS, ROPE, ROTATE, HALF, BLOCK_TOKENS, BLOCK_HEADS,
        )  # fmt: skip
