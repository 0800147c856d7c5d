"""The Triton kernel behind `latent_write`. Import it only where Triton is to run: on a GPU, or in its interpreter.

Grid: [blocks of tokens, blocks of slice columns + 1]. Every program norms its tokens' whole latent again (1 KB a token
out of the L2 cache), so no program waits for another; the last column of programs rotates and writes the rope key.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

ROTATE_NOT, ROTATE_PAIRS, ROTATE_HALVES = 0, 1, 2


@triton.jit(do_not_specialize=["tokens"])
def latent_write_kernel(
    latent,  # [tokens, D], rows latent_stride apart
    k_rope,  # [tokens, ROPE], rows rope_stride apart
    weight,  # [D]
    z,  # [D, W] float32, contiguous
    cos_sin,  # [positions, ROPE] float32: cosines, then sines
    positions,  # [tokens]
    slots,  # [tokens]
    cache,  # [slots, W + ROPE], rows cache_stride apart
    latent_stride,
    rope_stride,
    cache_stride,
    tokens,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    ROPE: tl.constexpr,
    PROJECT: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    token = token.to(tl.int64)
    row = cache + tl.load(slots + token, mask=live, other=0).to(tl.int64) * cache_stride
    first = tl.program_id(1) * BLOCK_W
    if first < W:
        column = first + tl.arange(0, BLOCK_W)
        square = tl.zeros([BLOCK_TOKENS], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = live[:, None] & (d < D)[None, :]
            x = tl.load(latent + token[:, None] * latent_stride + d[None, :], mask=here, other=0.0)
            x = x.to(tl.float32)
            square += tl.sum(x * x, 1)
        inverse = tl.rsqrt(square / D + eps)
        if PROJECT:
            value = tl.zeros([BLOCK_TOKENS, BLOCK_W], tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                here = live[:, None] & (d < D)[None, :]
                x = tl.load(latent + token[:, None] * latent_stride + d[None, :], mask=here, other=0.0)
                scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
                normed = x.to(tl.float32) * inverse[:, None] * scale[None, :]
                normed = normed.to(cache.dtype.element_ty).to(tl.float32)  # as a norm of its own rounds
                inside = (d < D)[:, None] & (column < W)[None, :]
                tile = tl.load(z + d[:, None] * W + column[None, :], mask=inside, other=0.0)
                if BLOCK_TOKENS == 1:  # as many products as one token needs, and no tensor core
                    value += tl.sum(tl.reshape(normed, [BLOCK_D, 1]) * tile, 0)[None, :]
                else:  # normed is exact in tf32; z is taken in three parts
                    value = tl.dot(normed, tile, value, input_precision="tf32x3")
        else:
            here = live[:, None] & (column < W)[None, :]
            x = tl.load(latent + token[:, None] * latent_stride + column[None, :], mask=here, other=0.0)
            scale = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
            value = x.to(tl.float32) * inverse[:, None] * scale[None, :]
        here = live[:, None] & (column < W)[None, :]
        tl.store(row[:, None] + column[None, :], value.to(cache.dtype.element_ty), mask=here)
    else:
        pair = tl.arange(0, HALF)
        whole = live[:, None] & (pair < ROPE // 2)[None, :]
        # where the two members of a pair lie: side by side, or half a vector apart
        a = pair if ROTATE == 2 else 2 * pair
        b = pair + ROPE // 2 if ROTATE == 2 else 2 * pair + 1
        key = k_rope + token[:, None] * rope_stride
        even = tl.load(key + a[None, :], mask=whole, other=0.0)
        odd = tl.load(key + b[None, :], mask=whole, other=0.0)
        if ROTATE:
            turn = cos_sin + tl.load(positions + token, mask=live, other=0).to(tl.int64)[:, None] * ROPE
            cos = tl.load(turn + pair[None, :], mask=whole, other=0.0)
            sin = tl.load(turn + (pair + ROPE // 2)[None, :], mask=whole, other=0.0)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            even, odd = even * cos - odd * sin, odd * cos + even * sin
        out = row[:, None] + W
        tl.store(out + a[None, :], even.to(cache.dtype.element_ty), mask=whole)
        tl.store(out + b[None, :], odd.to(cache.dtype.element_ty), mask=whole)
