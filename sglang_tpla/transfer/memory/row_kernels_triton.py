"""The Triton kernels behind `row_kernels`. Import this file only where Triton runs: on a GPU, or in its interpreter."""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.cache_rows.rounding_triton import nearest_bfloat16, upper_half, write_field, write_sketch


@triton.jit
def layer_rows(pool, table, layer, slots, token, live, ALIGNED: tl.constexpr):
    """Return pointers to the rows [tokens] of one layer. ``ALIGNED`` (items) divides the offsets of layers and rows."""
    start = tl.multiple_of(tl.load(table + 2 * layer), ALIGNED)
    step = tl.multiple_of(tl.load(table + 2 * layer + 1), ALIGNED)
    return pool + start + tl.load(slots + token, mask=live, other=0) * step


@triton.jit(do_not_specialize=["first_layer", "tokens"])
def project_kernel(
    pool,  # the first layer of the table
    table,  # [layers, 2] int64: a layer's offset from the first one, and the distance between its rows, in items
    slots,  # [tokens] int64
    z,  # [layers, Z_PARTS, D, Z_COLUMNS] bfloat16; unread unless PROJECTED
    out,  # [layers, tokens, COLUMNS + KEY], written
    wrong,  # [1] int32, cleared if CLEARED
    first_layer,
    tokens,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,  # the columns of z are COUNT from FIRST on, then those from SECOND on
    COUNT: tl.constexpr,
    SECOND: tl.constexpr,
    Z_COLUMNS: tl.constexpr,
    KEY: tl.constexpr,  # values of the rotary key; 0 if none are wanted
    PROJECTED: tl.constexpr,
    CLEARED: tl.constexpr,
    X_PARTS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, whose products treat bfloat16 as integers
    ALIGNED: tl.constexpr,
    Z_ALIGNED: tl.constexpr,  # divides the offsets of the runs and the rows of z
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """Grid: [blocks of tokens, blocks of columns of either run and one for the key, layers].

    Products of two small parts of x and z are left out.
    """
    FIRST_BLOCKS: tl.constexpr = (COUNT + BLOCK_W - 1) // BLOCK_W
    BLOCKS: tl.constexpr = FIRST_BLOCKS + (COLUMNS - COUNT + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(1)
    layer = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    row = layer_rows(pool, table, first_layer + layer, slots, token, live, ALIGNED)
    target = out + (layer.to(tl.int64) * tokens + token) * (COLUMNS + KEY)
    if CLEARED and (tl.program_id(0) + block + layer == 0):
        tl.store(wrong, 0)
    if block < BLOCKS:
        # a block lies within one run, so that its columns are contiguous
        later = block >= FIRST_BLOCKS
        begin = (block - tl.where(later, FIRST_BLOCKS, 0)) * BLOCK_W
        column = begin + tl.arange(0, BLOCK_W)
        inside = column < tl.where(later, COLUMNS - COUNT, COUNT)
        there = live[:, None] & inside[None, :]
        if PROJECTED:
            value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
            weights = z + layer.to(tl.int64) * (Z_PARTS * D * Z_COLUMNS)
            weights += tl.multiple_of(begin + tl.where(later, SECOND, FIRST), Z_ALIGNED) + tl.arange(0, BLOCK_W)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
                for i in tl.static_range(X_PARTS):
                    if X_PARTS == 1:
                        a = x.to(OPERAND)
                    else:
                        x = x.to(tl.float32)
                        a = upper_half(x)
                        x -= a
                        a = a.to(OPERAND)
                    for part in tl.static_range(Z_PARTS - i):
                        tile = weights[None, :] + (part * D + d)[:, None] * Z_COLUMNS
                        b = tl.load(tile, mask=(d < D)[:, None] & inside[None, :], other=0.0)
                        value = tl.dot(a, b.to(OPERAND), value)
        else:
            value = tl.load(row[:, None] + column[None, :], mask=there, other=0)
        place = column + tl.where(later, COUNT, 0)
        tl.store(target[:, None] + place[None, :], value.to(out.dtype.element_ty), mask=there)
    elif KEY:
        pair = tl.arange(0, BLOCK_KEY)
        in_key = live[:, None] & (pair < KEY)[None, :]
        key = tl.load(row[:, None] + D + pair[None, :], mask=in_key, other=0)
        tl.store(target[:, None] + COLUMNS + pair[None, :], key.to(out.dtype.element_ty), mask=in_key)


@triton.jit
def store_scale(target, scale, wrong):
    """Store a bfloat16 scale at any byte. A scale that is not finite shows that some value was not."""
    bits = scale.to(tl.int32, bitcast=True)
    tl.store(target, ((bits >> 16) & 255).to(tl.uint8))
    tl.store(target + 1, ((bits >> 24) & 255).to(tl.uint8))
    tl.store(wrong, 1, mask=(bits & 0x7F800000) == 0x7F800000)


@triton.jit
def store_one(target):
    """Store 1, the scale of a field that has none."""
    tl.store(target, 0x80)
    tl.store(target + 1, 0x3F)


@triton.jit
def encode_kernel(
    work,  # [rows, WIDTH] float32: the shared, own and sketch columns and the key, as far as the part has them
    out,  # [rows, ROW_BYTES] uint8, written
    wrong,  # [1] int32, set to 1 if a value is not finite
    step,
    reach,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SHARED: tl.constexpr,  # of each field: the number of columns, then the offsets of its bytes and its scale
    SHARED_SCALE: tl.constexpr,
    TURN: tl.constexpr,
    TWICE: tl.constexpr,  # whether the bytes of the other turn follow
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
                store_scale(target + SHARED_SCALE, scale, wrong)
            else:
                store_one(target + SHARED_SCALE)
    elif field == 1:
        if OWN:
            scale = write_field(target + OWN_TO, source, source, 1.0, SHARED, OWN, BLOCK_OWN, False, 0.0)
            store_scale(target + OWN_SCALE, scale, wrong)
    elif field == 2:
        if SKETCH:
            scale = write_sketch(
                target + SKETCH_TO, source + SHARED + OWN, source, 1.0, step, reach, SKETCH, SKIP, SKIPPED, BITS,
                BLOCK_SKETCH, BLOCK_SKETCH, False,
            )  # fmt: skip
            store_scale(target + SKETCH_SCALE, scale, wrong)
    elif KEY_SCALE >= 0:
        FROM: tl.constexpr = SHARED + OWN + SKETCH
        if KEY_BITS == 8 and KEY:
            scale = write_field(target + KEY_TO, source, source, 1.0, FROM, KEY, BLOCK_KEY, False, TURN, KEY_TWICE)
            store_scale(target + KEY_SCALE, scale, wrong)
        else:
            at = tl.arange(0, BLOCK_KEY)
            key = tl.load(source + FROM + at, mask=at < KEY, other=0.0)
            tl.store(wrong, 1, mask=tl.sum((key - key != 0.0).to(tl.int32)) > 0)
            bits = nearest_bfloat16(key).to(tl.int32, bitcast=True)
            tl.store(target + KEY_TO + 2 * at, ((bits >> 16) & 255).to(tl.uint8), mask=at < KEY)
            tl.store(target + KEY_TO + 2 * at + 1, ((bits >> 24) & 255).to(tl.uint8), mask=at < KEY)
            store_one(target + KEY_SCALE)


@triton.jit(do_not_specialize=["first_layer", "tokens"])
def scatter_kernel(
    payload,  # [layers, tokens, ITEMS]
    places,  # [COUNT, 2] int32: an item of the payload and its place in a row
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
