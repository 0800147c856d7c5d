"""The Triton kernels behind `row_kernels`. Import this file only where Triton runs: on a GPU, or in its interpreter."""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.cache_rows.rounding_triton import nearest_bfloat16, upper_half, write_field, write_sketch


@triton.jit
def layer_rows(pool, table, layer, slots, token, live, ALIGNED: tl.constexpr):
    """Point at the rows [tokens] of one layer. ``ALIGNED`` divides, in items, where layers and rows begin."""
    start = tl.multiple_of(tl.load(table + 2 * layer), ALIGNED)
    step = tl.multiple_of(tl.load(table + 2 * layer + 1), ALIGNED)
    return pool + start + tl.load(slots + token, mask=live, other=0) * step


@triton.jit
def product(x, z, value, X_PARTS: tl.constexpr, Z_PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Add float32 [tokens, d] times [d, columns] to ``value`` on tensor cores, in parts that bfloat16 holds.

    Products of two small parts are left out.
    """
    for i in tl.static_range(X_PARTS):
        a = upper_half(x)
        x -= a
        rest = z
        for _ in tl.static_range(Z_PARTS - i):
            b = upper_half(rest)
            rest -= b
            value = tl.dot(a.to(OPERAND), b.to(OPERAND), value)
    return value


@triton.jit
def not_finite(x):
    """1 where a value is not finite, otherwise 0."""
    wide = x.to(tl.float32)
    return (wide - wide != 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["first_layer", "tokens", "z_stride"])
def project_kernel(
    pool,  # the first layer of the table
    table,  # [layers, 2] int64: where a layer begins, from the first one, and from row to row, in items
    slots,  # [tokens] int64
    z,  # [layers, D, Z_COLUMNS] float32, layers z_stride apart; unread unless PROJECTED
    out,  # [layers, tokens, COLUMNS + KEY], written
    odd,  # [layers, blocks of tokens, 2] int32, written: how many values of latents and keys are not finite
    first_layer,
    tokens,
    z_stride,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,  # the columns of z are COUNT from FIRST on, then those from SECOND on
    COUNT: tl.constexpr,
    SECOND: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    KEY: tl.constexpr,  # values of the rotary key; 0 where none is wanted
    PROJECTED: tl.constexpr,
    CHECKED: tl.constexpr,  # whether ``odd`` is written
    X_PARTS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which takes bfloat16 for integers there
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """Grid: [blocks of tokens, blocks of columns and one for the key, layers]."""
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(1)
    layer = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    row = layer_rows(pool, table, first_layer + layer, slots, token, live, ALIGNED)
    target = out + (layer.to(tl.int64) * tokens + token) * (COLUMNS + KEY)
    found = odd + (layer * tl.num_programs(0) + tl.program_id(0)) * 2
    if block < COLUMN_BLOCKS:
        column = block * BLOCK_W + tl.arange(0, BLOCK_W)
        there = live[:, None] & (column < COLUMNS)[None, :]
        if PROJECTED:
            value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
            wrong = tl.zeros([BLOCK_TOKENS, BLOCK_D], tl.int32)
            weights = z + layer.to(tl.int64) * z_stride
            weights += tl.where(column < COUNT, FIRST + column, SECOND + column - COUNT)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
                inside = (d < D)[:, None] & (column < COLUMNS)[None, :]
                tile = tl.load(weights[None, :] + d[:, None] * Z_COLUMNS, mask=inside, other=0.0)
                if CHECKED:
                    wrong += not_finite(x)
                value = product(x.to(tl.float32), tile, value, X_PARTS, Z_PARTS, OPERAND)
        else:
            value = tl.load(row[:, None] + column[None, :], mask=there, other=0)
            if CHECKED:
                wrong = not_finite(value)
        if CHECKED and block == 0:
            tl.store(found, tl.sum(wrong))
        tl.store(target[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=there)
    elif KEY:
        place = tl.arange(0, BLOCK_KEY)
        inside_key = live[:, None] & (place < KEY)[None, :]
        key = tl.load(row[:, None] + D + place[None, :], mask=inside_key, other=0)
        if CHECKED:
            tl.store(found + 1, tl.sum(not_finite(key)))
        tl.store(target[:, None] + COLUMNS + place[None, :], key.to(out.dtype.element_ty), mask=inside_key)


@triton.jit
def store_scale(target, scale):
    """Write a bfloat16 scale at any byte."""
    bits = scale.to(tl.int32, bitcast=True) >> 16
    tl.store(target, (bits & 255).to(tl.uint8))
    tl.store(target + 1, ((bits >> 8) & 255).to(tl.uint8))


@triton.jit
def store_one(target):
    """Write the scale of a field that has none."""
    tl.store(target, 0x80)
    tl.store(target + 1, 0x3F)


@triton.jit
def encode_kernel(
    work,  # [rows, WIDTH] float32: shared and own columns, those of the sketch, the key, as far as there are any
    out,  # [rows, ROW_BYTES] uint8, written
    step,
    reach,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SHARED: tl.constexpr,  # how many columns a field has, then where its bytes and its scale go
    SHARED_SCALE: tl.constexpr,
    TURN: tl.constexpr,
    TWICE: tl.constexpr,  # the bytes of the other turn follow
    OWN: tl.constexpr,
    OWN_TO: tl.constexpr,
    OWN_SCALE: tl.constexpr,
    SKETCH: tl.constexpr,
    SKETCH_TO: tl.constexpr,
    SKETCH_SCALE: tl.constexpr,
    SKIP: tl.constexpr,
    SKIPPED: tl.constexpr,
    BITS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_TO: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_TWICE: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """Grid: [rows, four fields]."""
    row = tl.program_id(0).to(tl.int64)
    field = tl.program_id(1)
    source = work + row * WIDTH
    target = out + row * ROW_BYTES
    if field == 0:
        if SHARED_SCALE >= 0:
            if SHARED:
                scale = write_field(target, source, source, 1.0, 0, SHARED, BLOCK_SHARED, False, TURN, TWICE)
                store_scale(target + SHARED_SCALE, scale)
            else:
                store_one(target + SHARED_SCALE)
    elif field == 1:
        if OWN:
            scale = write_field(target + OWN_TO, source, source, 1.0, SHARED, OWN, BLOCK_OWN, False, 0.0)
            store_scale(target + OWN_SCALE, scale)
    elif field == 2:
        if SKETCH:
            scale = write_sketch(
                target + SKETCH_TO, source + SHARED + OWN, source, 1.0, step, reach, SKETCH, SKIP, SKIPPED, BITS,
                BLOCK_SKETCH, False,
            )  # fmt: skip
            store_scale(target + SKETCH_SCALE, scale)
    elif KEY_SCALE >= 0:
        FROM: tl.constexpr = SHARED + OWN + SKETCH
        if KEY_BITS == 8 and KEY:
            scale = write_field(target + KEY_TO, source, source, 1.0, FROM, KEY, BLOCK_KEY, False, TURN, KEY_TWICE)
            store_scale(target + KEY_SCALE, scale)
        else:
            at = tl.arange(0, BLOCK_KEY)
            bits = nearest_bfloat16(tl.load(source + FROM + at, mask=at < KEY, other=0.0)).to(tl.int32, bitcast=True)
            tl.store(target + KEY_TO + 2 * at, ((bits >> 16) & 255).to(tl.uint8), mask=at < KEY)
            tl.store(target + KEY_TO + 2 * at + 1, ((bits >> 24) & 255).to(tl.uint8), mask=at < KEY)
            store_one(target + KEY_SCALE)


@triton.jit(do_not_specialize=["first_layer", "tokens"])
def scatter_kernel(
    payload,  # [layers, tokens, ITEMS]
    places,  # [COUNT, 2] int32: from which item of the payload to which item of a row
    pool,
    table,
    slots,  # [tokens] int64
    first_layer,
    tokens,
    ITEMS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [blocks of tokens, blocks of items, layers]."""
    layer = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    row = layer_rows(pool, table, first_layer + layer, slots, token, live, 1)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(places + 2 * item, mask=item < COUNT, other=0)
    to = tl.load(places + 2 * item + 1, mask=item < COUNT, other=0)
    source = payload + (layer.to(tl.int64) * tokens + token) * ITEMS
    there = live[:, None] & (item < COUNT)[None, :]
    value = tl.load(source[:, None] + taken[None, :], mask=there, other=0)
    tl.store(row[:, None] + to[None, :], value, mask=there)
