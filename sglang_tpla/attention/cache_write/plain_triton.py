"""The Triton kernel behind `cache_write.plain`, and the parts that it shares with the kernels of other row formats.

Import this file only where Triton runs: on a GPU, or in its interpreter.

Grid: [blocks of tokens, blocks of slice columns, one block for the rope key, blocks of query heads]. Every program of
slice columns norms its tokens' whole latent again (1 KB a token from the L2 cache), so that no program waits for
another; the other programs rotate.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

from sglang_tpla.attention.cache_write.inputs import CacheWrite

ROTATE_NOT, ROTATE_PAIRS, ROTATE_HALVES = 0, 1, 2


def rotation(new: CacheWrite) -> int:
    """Return how the kernel rotates keys and queries, as one of the ``ROTATE_`` constants."""
    if new.cos_sin is None:
        return ROTATE_NOT
    return ROTATE_HALVES if new.neox else ROTATE_PAIRS


@triton.jit
def rotated_pairs(
    vector, cos_sin, positions, token, live, ROPE: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr
):
    """Rotate the pairs of [rows] vectors of [rows] tokens.

    Returns both members of the pairs, the columns of both, and the mask of the pairs that exist.
    """
    pair = tl.arange(0, HALF)
    whole = live[:, None] & (pair < ROPE // 2)[None, :]
    # A pair's members are adjacent, or half a vector apart.
    a = pair if ROTATE == 2 else 2 * pair
    b = pair + ROPE // 2 if ROTATE == 2 else 2 * pair + 1
    even = tl.load(vector[:, None] + a[None, :], mask=whole, other=0.0)
    odd = tl.load(vector[:, None] + b[None, :], mask=whole, other=0.0)
    if ROTATE:
        turn = cos_sin + tl.load(positions + token, mask=live, other=0).to(tl.int64)[:, None] * ROPE
        cos = tl.load(turn + pair[None, :], mask=whole, other=0.0)
        sin = tl.load(turn + (pair + ROPE // 2)[None, :], mask=whole, other=0.0)
        x, y = even.to(tl.float32), odd.to(tl.float32)
        even, odd = (x * cos - y * sin).to(even.dtype), (y * cos + x * sin).to(odd.dtype)
    return even, odd, a, b, whole


@triton.jit
def inverse_rms(latent, live, eps, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the factor [tokens] that norms each latent; ``latent`` holds a pointer to each token's latent."""
    square = tl.zeros([BLOCK_TOKENS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = live[:, None] & (d < D)[None, :]
        x = tl.load(latent[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
    return tl.rsqrt(square / D + eps)


@triton.jit
def slice_columns(
    latent,
    weight,
    z,
    live,
    column,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return some columns of the normed latents, or of their projection by ``z``, as [tokens, columns] float32.

    ``latent`` holds a pointer to each token's latent.
    """
    there = live[:, None] & (column < W)[None, :]
    inverse = inverse_rms(latent, live, eps, D, BLOCK_TOKENS, BLOCK_D)
    # The norm is rounded to the model's dtype, as a separate norm kernel would round it.
    if not PROJECT:
        x = tl.load(latent[:, None] + column[None, :], mask=there, other=0.0).to(tl.float32)
        scale = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
        return (x * inverse[:, None] * scale[None, :]).to(latent.dtype.element_ty).to(tl.float32)
    value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = live[:, None] & (d < D)[None, :]
        x = tl.load(latent[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
        scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        normed = (x * inverse[:, None] * scale[None, :]).to(latent.dtype.element_ty).to(tl.float32)
        inside = (d < D)[:, None] & (column < W)[None, :]
        tile = tl.load(z + d[:, None] * W + column[None, :], mask=inside, other=0.0)
        # Tensor cores in float32's precision (tf32x3) were two to ten times slower here for few tokens.
        value += tl.sum(normed[:, :, None] * tile[None, :, :], 1)
    return value


@triton.jit
def write_key(
    key,
    row,
    cos_sin,
    positions,
    token,
    live,
    W: tl.constexpr,
    ROPE: tl.constexpr,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate [tokens] keys and write them behind the slices."""
    even, odd, a, b, whole = rotated_pairs(key, cos_sin, positions, token, live, ROPE, ROTATE, HALF)
    tl.store(row[:, None] + W + a[None, :], even.to(row.dtype.element_ty), mask=whole)
    tl.store(row[:, None] + W + b[None, :], odd.to(row.dtype.element_ty), mask=whole)


@triton.jit
def rotate_queries(
    q_rope,
    cos_sin,
    positions,
    block,
    tokens,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Rotate the queries of this program's tokens and of the ``block``-th block of heads in place."""
    member = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)
    head = block * BLOCK_HEADS + member % BLOCK_HEADS
    token = tl.program_id(0) * BLOCK_TOKENS + member // BLOCK_HEADS
    live = (token < tokens) & (head < HEADS)
    token = token.to(tl.int64)
    query = q_rope + token * token_stride + head.to(tl.int64) * head_stride
    even, odd, a, b, whole = rotated_pairs(query, cos_sin, positions, token, live, ROPE, ROTATE, HALF)
    tl.store(query[:, None] + a[None, :], even, mask=whole)
    tl.store(query[:, None] + b[None, :], odd, mask=whole)


@triton.jit(do_not_specialize=["tokens"])
def latent_write_kernel(
    latent,  # [tokens, D], rows latent_stride apart
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    q_rope,  # [tokens, HEADS, ROPE], rotated in place; unread where HEADS is 0
    weight,  # [D]
    z,  # [D, W] float32, contiguous
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    cache,  # [slots, W + ROPE], rows cache_stride apart
    latent_stride,
    rope_stride,
    q_token_stride,
    q_head_stride,
    cache_stride,
    tokens,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    PROJECT: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    COLUMN_BLOCKS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(1)
    if block <= COLUMN_BLOCKS:
        token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        row = cache + tl.load(slots + token, mask=live, other=0).to(tl.int64) * cache_stride
        if block < COLUMN_BLOCKS:
            column = block * BLOCK_W + tl.arange(0, BLOCK_W)
            raw = latent + token * latent_stride
            value = slice_columns(raw, weight, z, live, column, eps, D, W, PROJECT, BLOCK_TOKENS, BLOCK_W, BLOCK_D)
            there = live[:, None] & (column < W)[None, :]
            tl.store(row[:, None] + column[None, :], value.to(row.dtype.element_ty), mask=there)
        else:
            key = k_rope + token * rope_stride
            write_key(key, row, cos_sin, positions, token, live, W, ROPE, ROTATE, HALF)
    elif HEADS:
        rotate_queries(
            q_rope, cos_sin, positions, block - COLUMN_BLOCKS - 1, tokens, q_token_stride, q_head_stride,
            HEADS, ROPE, ROTATE, HALF, BLOCK_TOKENS, BLOCK_HEADS,
        )  # fmt: skip
