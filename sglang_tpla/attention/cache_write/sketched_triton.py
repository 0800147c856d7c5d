"""The Triton kernels behind `cache_write.sketched`. Import it only where Triton runs: on a GPU, or in its interpreter.

The first kernel projects; the second encodes the projected columns as rows. They are separate because a field has one
scale, while many programs project its columns. If nothing is projected, the second kernel norms and runs alone.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_tpla.attention.cache_write.plain_triton import rotate_queries, rotated_pairs
from sglang_tpla.cache_rows.rounding_triton import (
    byte_codes,
    byte_scale,
    upper_half,
    write_field,
    write_sketch,
)


@triton.jit
def products(x, z, X_PARTS: tl.constexpr, Z_PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Multiply float32 [splits, tokens, d] by [splits, d, columns] on tensor cores, in parts that bfloat16 holds.

    The products of two small parts are omitted.
    """
    value = tl.zeros([x.shape[0], x.shape[1], z.shape[2]], tl.float32)
    for i in tl.static_range(X_PARTS):
        a = upper_half(x)
        x -= a
        rest = z
        for _ in tl.static_range(Z_PARTS - i):
            b = upper_half(rest)
            rest -= b
            # Each product has a separate sum: a product that accumulated into a shared one would wait for it.
            value += tl.dot(a.to(OPERAND), b.to(OPERAND))
    return value


@triton.jit(do_not_specialize=["tokens"])
def projection_kernel(
    latent,  # [tokens, D], rows latent_stride apart
    weight,  # [D]
    z,  # [D, COLUMNS] float32, contiguous
    work,  # [tokens, COLUMNS] float32, written
    latent_stride,
    tokens,
    eps,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    X_PARTS: tl.constexpr,
    Z_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which takes bfloat16 operands for integers
    FOLLOWED: tl.constexpr,  # whether the next kernel may start early and itself waits for this one's end
    LATE: tl.constexpr,  # whether the next kernel starts after this one's loads
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of one split; all splits hold D values
):
    """Norm and project. Grid: [blocks of tokens, blocks of columns].

    The sum over D is split among the warps of a program, because one warp would compute its sums in sequence.
    """
    if FOLLOWED and not LATE:
        gdc_launch_dependents()
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = tl.arange(0, SPLITS * BLOCK_D)
    token = token.to(tl.int64)
    # All loads come before the first use of a loaded value. Every token loads the norm's weight in the layout of the
    # latents: converting it from another layout would wait for the load.
    here = (token < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(latent + token[:, None] * latent_stride + d[None, :], mask=here, other=0.0).to(tl.float32)
    scale = tl.load(weight + token[:, None] * 0 + d[None, :], mask=here, other=0.0).to(tl.float32)
    inside = (d < D)[:, None] & (column < COLUMNS)[None, :]
    tile = tl.load(z + d[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
    if FOLLOWED and LATE:
        gdc_launch_dependents()
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    # The norm is rounded to the model's dtype, as a separate norm kernel would round it.
    normed = (x * inverse[:, None] * scale).to(latent.dtype.element_ty).to(tl.float32)
    if BLOCK_TOKENS == 1:
        value = tl.sum(tl.reshape(normed, [SPLITS * BLOCK_D, 1]) * tile, 0)[None, :]
    else:
        split = tl.permute(tl.reshape(normed, [BLOCK_TOKENS, SPLITS, BLOCK_D]), (1, 0, 2))
        value = products(split, tl.reshape(tile, [SPLITS, BLOCK_D, BLOCK_W]), X_PARTS, Z_PARTS, OPERAND)
        value = tl.sum(value, 0)
    there = (token < tokens)[:, None] & (column < COLUMNS)[None, :]
    tl.store(work + token[:, None] * COLUMNS + column[None, :], value, mask=there)


@triton.jit
def write_key(
    row,
    row16,
    key,
    cos_sin,
    positions,
    token,
    ROPE: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    W_PAD: tl.constexpr,
    TURN: tl.constexpr,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate and write one token's key, and return its scale."""
    one = tl.zeros([1], tl.int64)
    even, odd, a, b, whole = rotated_pairs(key + one, cos_sin, positions, token + one, one == 0, ROPE, ROTATE, HALF)
    scale = 1.0
    if ROPE_BITS == 8:
        even, odd = tl.where(whole, even.to(tl.float32), 0.0), tl.where(whole, odd.to(tl.float32), 0.0)
        both = tl.maximum(tl.abs(even).to(tl.int32, bitcast=True), tl.abs(odd).to(tl.int32, bitcast=True))
        scale = byte_scale(tl.max(both).to(tl.float32, bitcast=True))
        tl.store(row + W_PAD + a[None, :] + one[:, None], byte_codes(even, scale, a[None, :], TURN), mask=whole)
        tl.store(row + W_PAD + b[None, :] + one[:, None], byte_codes(odd, scale, b[None, :], TURN), mask=whole)
    else:
        tl.store(row16 + W_PAD // 2 + a[None, :] + one[:, None], even.to(tl.bfloat16), mask=whole)
        tl.store(row16 + W_PAD // 2 + b[None, :] + one[:, None], odd.to(tl.bfloat16), mask=whole)
    return scale


@triton.jit
def rows_kernel(
    source,  # [tokens, COLUMNS], rows source_stride apart: finished columns, or latents to be normed
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    q_rope,  # [tokens, HEADS, ROPE], rotated in place; unread where HEADS is 0
    weight,  # [COLUMNS]; unread unless NORMED
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    cache,  # [slots, row bytes] uint8, rows cache_stride apart
    cache16,  # the same in units of bfloat16
    source_stride,
    rope_stride,
    q_token_stride,
    q_head_stride,
    cache_stride,
    eps,
    step,
    reach,
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
    NORMED: tl.constexpr,
    ROTATE: tl.constexpr,
    FOLLOWS: tl.constexpr,  # whether the preceding kernel writes ``source`` and may still run
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SKETCH: tl.constexpr,
):
    """Make rows of columns, keys and queries. Grid: [tokens, fields of columns + one for the key + blocks of heads].

    The first field is the shared columns; its program also writes the padding and the scales of absent fields. Own
    columns and sketch follow if there are any.
    """
    FIELDS: tl.constexpr = 3 if OWN else 1
    SKETCH: tl.constexpr = W_PAD + ROPE * ROPE_BITS // 8
    SKETCH_BYTES: tl.constexpr = (GROUPS - 1) * OWN * BITS // 8
    block = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    if block <= FIELDS:
        at = tl.load(slots + token).to(tl.int64) * cache_stride
        row = cache + at
        row16 = cache16 + at // 2
        scales = row16 + SCALES // 2
        source += token * source_stride
        inverse = 1.0
        if block < FIELDS:
            if FOLLOWS:
                gdc_wait()
            if NORMED:
                column = tl.arange(0, BLOCK_COLUMNS)
                x = tl.load(source + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
                inverse = tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + eps)
        if block == 0:
            scale = 1.0
            if SHARED:
                scale = write_field(row, source, weight, inverse, 0, SHARED, BLOCK_SHARED, NORMED, TURN)
            tl.store(scales, scale.to(tl.bfloat16))
            if OWN == 0:
                tl.store(scales + 1, 1.0)
                tl.store(scales + 2, 1.0)
            few = tl.arange(0, 16)
            nothing = tl.zeros([16], tl.uint8)
            tl.store(row + SHARED + OWN + few, nothing + 128, mask=few < W_PAD - SHARED - OWN)
            tl.store(row + SKETCH + SKETCH_BYTES + few, nothing, mask=few < SCALES - SKETCH - SKETCH_BYTES)
        elif block == FIELDS:
            scale = 1.0
            if ROPE:
                key = k_rope + token * rope_stride
                scale = write_key(
                    row, row16, key, cos_sin, positions, token, ROPE, ROPE_BITS, W_PAD, TURN, ROTATE, HALF
                )  # fmt: skip
            tl.store(scales + 3, scale.to(tl.bfloat16))
        elif block == 1:
            scale = write_field(row + SHARED, source, weight, inverse, SHARED, OWN, BLOCK_OWN, NORMED, 0.0)
            tl.store(scales + 1, scale.to(tl.bfloat16))
        else:
            scale = write_sketch(
                row + SKETCH, source + SHARED + OWN, weight + SHARED + OWN, inverse, step, reach, GROUPS * OWN,
                GROUP * OWN, OWN, BITS, BLOCK_SKETCH, BLOCK_COLUMNS, NORMED,
            )  # fmt: skip
            tl.store(scales + 2, scale.to(tl.bfloat16))
    elif HEADS:
        rotate_queries(
            q_rope, cos_sin, positions, block - FIELDS - 1, tl.num_programs(0), q_token_stride, q_head_stride,
            HEADS, ROPE, ROTATE, HALF, 1, BLOCK_HEADS,
        )  # fmt: skip
