"""The Triton kernel behind `cache_write.sketched`. Import it only where Triton is to run: a GPU, or its interpreter.

Grid: [blocks of tokens; shared columns, own columns, the sketch, the key, then blocks of query heads]. A scale belongs
to a whole part, so one program takes all columns of a part. What a row holds: `cache_rows.sketched`.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.attention.cache_write.plain_triton import rotate_queries, rotated_pairs

GIVEN, NORMED, PROJECTED = (
    0,
    1,
    2,
)  # how columns come out of what is read: as they are, normed, normed and projected
INT8_LARGEST = tl.constexpr(127.0)
ROUNDING = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even
LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)


@triton.jit
def part_columns(
    source,
    weight,
    z,
    live,
    eps,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Projected columns FIRST ... FIRST + COUNT - 1 of [tokens], float32, zeros beyond them."""
    column = FIRST + tl.arange(0, BLOCK_W)
    mine = column < FIRST + COUNT
    there = live[:, None] & mine[None, :]
    if MODE != 0:
        square = tl.zeros([BLOCK_TOKENS], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = live[:, None] & (d < D)[None, :]
            x = tl.load(source[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1)
        inverse = tl.rsqrt(square / D + eps)
    if MODE == 2:
        value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = live[:, None] & (d < D)[None, :]
            x = tl.load(source[:, None] + d[None, :], mask=here, other=0.0)
            factor = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
            normed = x.to(tl.float32) * inverse[:, None] * factor[None, :]
            normed = normed.to(x.dtype).to(tl.float32)  # as a norm of its own rounds
            inside = (d < D)[:, None] & mine[None, :]
            tile = tl.load(z + d[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
            if BLOCK_TOKENS == 1:
                value += tl.sum(tl.reshape(normed, [BLOCK_D, 1]) * tile, 0)[None, :]
            else:  # normed is exact in tf32; z is taken in three parts
                value = tl.dot(normed, tile, value, input_precision="tf32x3")
    else:
        x = tl.load(source[:, None] + column[None, :], mask=there, other=0.0)
        value = x.to(tl.float32)
        if MODE == 1:
            factor = tl.load(weight + column, mask=mine, other=0.0).to(tl.float32)
            value = (value * inverse[:, None] * factor[None, :]).to(x.dtype).to(tl.float32)
    return value


@triton.jit
def int8_scale(largest):
    """The least bfloat16 scale, as float32, with which magnitudes up to ``largest`` fit into int8; 1 for zeros."""
    bits = (largest / INT8_LARGEST).to(tl.int32, bitcast=True)
    scale = ((bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def nearest_bfloat16(value):
    """[tokens] float32 rounded to bfloat16, ties to even; said in integers, as the interpreter's cast cuts off."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def int8_codes(value, scale):
    """[tokens, columns] in units of [tokens] scales, rounded half to even."""
    scaled = tl.div_rn(value, scale[:, None] + tl.zeros_like(value))
    rounded = (scaled + ROUNDING) - ROUNDING
    return tl.minimum(tl.maximum(rounded, -INT8_LARGEST), INT8_LARGEST).to(tl.int8)


@triton.jit
def write_int8(value, row, scale_at, live, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK_W: tl.constexpr):
    """Codes of one part at its place in [tokens] rows, and its scale."""
    column = tl.arange(0, BLOCK_W)
    scale = int8_scale(tl.max(tl.abs(value), 1))
    codes = int8_codes(value, scale)
    tl.store(row[:, None] + FIRST + column[None, :], codes, mask=live[:, None] & (column < COUNT)[None, :])
    tl.store(scale_at, scale.to(tl.bfloat16), mask=live)


@triton.jit
def write_sketch(
    value,
    middles,
    row,
    scale_at,
    live,
    deviation,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    OWN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Packed codes of the other groups' blocks, behind ``row``, and the scale of all blocks."""
    COUNT: tl.constexpr = GROUPS * OWN
    UNIT: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # codes that make whole bytes
    largest = tl.max(tl.abs(value), 1)
    unit = tl.where(largest > 0.0, largest, 1.0)
    relative = tl.div_rn(value, unit[:, None] + tl.zeros_like(value))
    rms = largest * tl.sqrt(tl.sum(relative * relative, 1) / COUNT)
    scale = nearest_bfloat16(tl.where(rms * deviation > LARGEST_BFLOAT16, LARGEST_BFLOAT16, rms * deviation))
    tl.store(scale_at, scale.to(tl.bfloat16), mask=live)
    divisor = tl.where(scale > 0.0, scale, 1.0)
    magnitude = tl.div_rn(tl.abs(value), divisor[:, None] + tl.zeros_like(value))
    code = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.int32)
    for level in tl.static_range(2 ** (BITS - 1) - 1):
        code += (magnitude >= tl.load(middles + level)).to(tl.int32)
    code += (value < 0.0).to(tl.int32) << (BITS - 1)
    place = tl.arange(0, UNIT)
    word = tl.sum(tl.reshape(code, [BLOCK_TOKENS, BLOCK_W // UNIT, UNIT]) << (place * BITS)[None, None, :], 2)
    first = tl.arange(0, BLOCK_W // UNIT) * UNIT
    block = first // OWN
    at = first * BITS // 8 - tl.where(block > GROUP, OWN * BITS // 8, 0)
    kept = live[:, None] & ((first < COUNT) & (block != GROUP))[None, :]
    for byte in tl.static_range(UNIT * BITS // 8):
        part = (word >> (8 * byte)) & 255
        tl.store(row[:, None] + at[None, :] + byte, part.to(tl.uint8).to(tl.int8, bitcast=True), mask=kept)


@triton.jit
def write_zeros(row, live, FIRST: tl.constexpr, STOP: tl.constexpr):
    """Zeros in bytes FIRST ... STOP - 1 of [tokens] rows, 16 at most."""
    column = FIRST + tl.arange(0, 16)
    zeros = (live[:, None] & (column < 0)[None, :]).to(tl.int8)
    tl.store(row[:, None] + column[None, :], zeros, mask=live[:, None] & (column < STOP)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def sketched_write_kernel(
    source,  # [tokens, D]: latents, or projected columns (MODE GIVEN); rows source_stride apart
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    q_rope,  # [tokens, HEADS, ROPE], rotated in place; unread where HEADS is 0
    weight,  # [D]
    z,  # [D, COLUMNS] float32, contiguous
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    codes,  # the cache's bytes as int8, rows row_bytes apart
    halves,  # the same as bfloat16
    middles,  # between a sketch code's magnitudes, in units of the scale
    source_stride,
    rope_stride,
    q_token_stride,
    q_head_stride,
    row_bytes,
    tokens,
    eps,
    deviation,  # largest magnitude in standard deviations, over 127
    SHARED: tl.constexpr,
    OWN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    W_PAD: tl.constexpr,
    SKETCH_AT: tl.constexpr,
    SKETCH_BYTES: tl.constexpr,
    SCALES_AT: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    W: tl.constexpr = SHARED + OWN
    block = tl.program_id(1)
    if block <= 3:
        token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        at = tl.load(slots + token, mask=live, other=0).to(tl.int64) * row_bytes
        row, scale_at = codes + at, halves + (at + SCALES_AT) // 2
        read = source + token * source_stride
        if block == 0:
            if SHARED:
                value = part_columns(
                    read,
                    weight,
                    z,
                    live,
                    eps,
                    0,
                    SHARED,
                    D,
                    COLUMNS,
                    MODE,
                    BLOCK_TOKENS,
                    BLOCK_SHARED,
                    BLOCK_D,
                )
                write_int8(value, row, scale_at, live, 0, SHARED, BLOCK_SHARED)
            else:
                tl.store(scale_at, 1.0, mask=live)
        elif block == 1:
            if OWN:
                value = part_columns(
                    read,
                    weight,
                    z,
                    live,
                    eps,
                    SHARED,
                    OWN,
                    D,
                    COLUMNS,
                    MODE,
                    BLOCK_TOKENS,
                    BLOCK_OWN,
                    BLOCK_D,
                )
                write_int8(value, row, scale_at + 1, live, SHARED, OWN, BLOCK_OWN)
            else:
                tl.store(scale_at + 1, 1.0, mask=live)
            write_zeros(row, live, W, W_PAD)
        elif block == 2:
            if OWN:
                value = part_columns(
                    read,
                    weight,
                    z,
                    live,
                    eps,
                    W,
                    GROUPS * OWN,
                    D,
                    COLUMNS,
                    MODE,
                    BLOCK_TOKENS,
                    BLOCK_SKETCH,
                    BLOCK_D,
                )
                write_sketch(
                    value, middles, row + SKETCH_AT, scale_at + 2, live, deviation, GROUP, GROUPS, OWN, BITS,
                    BLOCK_TOKENS, BLOCK_SKETCH,
                )  # fmt: skip
            else:
                tl.store(scale_at + 2, 1.0, mask=live)
            write_zeros(row, live, SKETCH_AT + SKETCH_BYTES, SCALES_AT)
        else:
            key = k_rope + token * rope_stride
            even, odd, a, b, whole = rotated_pairs(key, cos_sin, positions, token, live, ROPE, ROTATE, HALF)
            if ROPE_BITS == 8:
                even, odd = even.to(tl.float32), odd.to(tl.float32)
                scale = int8_scale(tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1)))
                tl.store(row[:, None] + W_PAD + a[None, :], int8_codes(even, scale), mask=whole)
                tl.store(row[:, None] + W_PAD + b[None, :], int8_codes(odd, scale), mask=whole)
                tl.store(scale_at + 3, scale.to(tl.bfloat16), mask=live)
            else:
                place = halves + (at + W_PAD) // 2
                tl.store(place[:, None] + a[None, :], even.to(tl.bfloat16), mask=whole)
                tl.store(place[:, None] + b[None, :], odd.to(tl.bfloat16), mask=whole)
                tl.store(scale_at + 3, 1.0, mask=live)
    elif HEADS:
        member = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)
        head = (block - 4) * BLOCK_HEADS + member % BLOCK_HEADS
        asking = tl.program_id(0) * BLOCK_TOKENS + member // BLOCK_HEADS
        there = (asking < tokens) & (head < HEADS)
        asking = asking.to(tl.int64)
        query = q_rope + asking * q_token_stride + head.to(tl.int64) * q_head_stride
        rotate_queries(query, cos_sin, positions, asking, there, ROPE, ROTATE, HALF)
