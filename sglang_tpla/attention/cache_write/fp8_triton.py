"""The Triton kernel behind `cache_write.fp8`. Import it only where Triton runs: on a GPU, or in its interpreter.

Grid: [blocks of tokens, shared columns, own columns, the key, blocks of query heads]. A scale is the largest magnitude
of its whole part, so one program takes all columns of a part; the rest is as in `plain_triton`.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.attention.cache_write.plain_triton import inverse_rms, rotate_queries, write_key

LARGEST = tl.constexpr(448.0)


@triton.jit
def quantise_part(
    source,
    weight,
    z,
    values,
    scale_at,
    live,
    eps,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write columns FIRST ... FIRST + COUNT - 1 of [tokens] slices, and their scale.

    ``source`` points at each token's latent, ``values`` at its row, ``scale_at`` at the scale.
    """
    column = FIRST + tl.arange(0, BLOCK_W)
    mine = column < FIRST + COUNT
    there = live[:, None] & mine[None, :]
    if MODE != 0:
        inverse = inverse_rms(source, live, eps, D, BLOCK_TOKENS, BLOCK_D)
    if MODE == 2:
        value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = live[:, None] & (d < D)[None, :]
            x = tl.load(source[:, None] + d[None, :], mask=here, other=0.0)
            factor = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
            normed = x.to(tl.float32) * inverse[:, None] * factor[None, :]
            normed = normed.to(x.dtype).to(tl.float32)  # as where the norm is a kernel of its own
            inside = (d < D)[:, None] & mine[None, :]
            tile = tl.load(z + d[:, None] * W + column[None, :], mask=inside, other=0.0)
            if BLOCK_TOKENS == 1:
                value += tl.sum(tl.reshape(normed, [BLOCK_D, 1]) * tile, 0)[None, :]
            else:  # normed is exact in tf32; tf32x3 splits z into three parts
                value = tl.dot(normed, tile, value, input_precision="tf32x3")
    else:
        x = tl.load(source[:, None] + column[None, :], mask=there, other=0.0)
        value = x.to(tl.float32)
        if MODE == 1:
            factor = tl.load(weight + column, mask=mine, other=0.0).to(tl.float32)
            value = (value * inverse[:, None] * factor[None, :]).to(x.dtype).to(tl.float32)
    scale = tl.max(tl.abs(value), 1) / LARGEST
    scale = tl.where(scale > 0, scale, 1.0)
    scaled = tl.div_rn(value, scale[:, None] + tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32))
    tl.store(values[:, None] + column[None, :], scaled.to(values.dtype.element_ty), mask=there)
    tl.store(scale_at, scale, mask=live)


@triton.jit(do_not_specialize=["tokens"])
def fp8_write_kernel(
    source,  # [tokens, D]: latents, or slices (MODE GIVEN); rows source_stride apart
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    q_rope,  # [tokens, HEADS, ROPE], rotated in place; unread where HEADS is 0
    weight,  # [D]
    z,  # [D, W] float32, contiguous
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    values,  # the cache's bytes as e4m3, rows row_bytes apart
    keys,  # the same as bfloat16
    scales,  # the same as float32
    source_stride,
    rope_stride,
    q_token_stride,
    q_head_stride,
    row_bytes,
    tokens,
    eps,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    OWN: tl.constexpr = W - SHARED
    block = tl.program_id(1)
    if block <= 2:
        token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        row = tl.load(slots + token, mask=live, other=0).to(tl.int64) * row_bytes
        trailer = scales + (row + W + 2 * ROPE) // 4
        read = source + token * source_stride
        if block == 0:
            if SHARED:
                quantise_part(
                    read, weight, z, values + row, trailer, live, eps,
                    0, SHARED, D, W, MODE, BLOCK_TOKENS, BLOCK_SHARED, BLOCK_D,
                )  # fmt: skip
            else:
                tl.store(trailer, 1.0, mask=live)
        elif block == 1:
            if OWN:
                quantise_part(
                    read, weight, z, values + row, trailer + 1, live, eps,
                    SHARED, OWN, D, W, MODE, BLOCK_TOKENS, BLOCK_OWN, BLOCK_D,
                )  # fmt: skip
            else:
                tl.store(trailer + 1, 1.0, mask=live)
        else:
            key = k_rope + token * rope_stride
            write_key(key, keys + row // 2, cos_sin, positions, token, live, W // 2, ROPE, ROTATE, HALF)
            tl.store(trailer + 2, 0.0, mask=live)
            tl.store(trailer + 3, 0.0, mask=live)
    elif HEADS:
        rotate_queries(
            q_rope, cos_sin, positions, block - 3, tokens, q_token_stride, q_head_stride,
            HEADS, ROPE, ROTATE, HALF, BLOCK_TOKENS, BLOCK_HEADS,
        )  # fmt: skip
