"""Write one decode step's new cache rows in one launch: norm, projection to the slice, rotation, paged write.

    z = RMSNorm(c; weight, eps) Z,    cache[slot] = [z | R(position) k_rope],    q_rope <- R(position) q_rope

(docs/design.md, section 2). Stock MLA needs three launches: the norm, the rotation of queries and key, the write.

The norm covers the whole latent and is rounded to the cache's dtype before the projection, as in SGLang's
``kv_a_layernorm`` and in ``transfer.memory.projection.project_latent``, so that new rows and transferred rows agree.
The rotation is that of SGLang's ``DeepseekScalingRotaryEmbedding``.
"""

from typing import NamedTuple

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite

FEW_TOKENS = 16  # a program takes one token up to this many tokens, and several beyond


class Tile(NamedTuple):
    """One program's share: tokens, columns of the slice, latent values at a time, query heads; all powers of two."""

    tokens: int
    columns: int
    latent: int
    heads: int


def tile_of(tokens: int, whole: int, columns: int | None) -> Tile:
    """Return the tile that was fastest on an H100 at widths 192, 256 and 320.

    Args:
        whole: latent values of a token, rounded up to a power of two.
        columns: columns of a slice, rounded up to a power of two, if nothing is projected; otherwise None.
    """
    if columns is not None:  # tokens and columns share no work
        return Tile(1, columns, whole, 16)
    return Tile(1, 16, whole, 16) if tokens <= FEW_TOKENS else Tile(4, 16, min(whole, 128), 4)


def operands(new: CacheWrite) -> tuple[torch.Tensor, ...]:
    """Return the input tensors in the order of the kernels' parameters, with another tensor in place of each None."""
    return (
        new.latent,
        new.k_rope,
        new.latent if new.q_rope is None else new.q_rope,
        new.latent if new.weight is None else new.weight,
        new.latent if new.z is None else new.z,
        new.latent if new.cos_sin is None else new.cos_sin,
        new.slots if new.positions is None else new.positions,
        new.slots,
    )


def strides(new: CacheWrite) -> tuple[int, ...]:
    """Return the strides of latent, key, query tokens, query heads and cache rows, as every kernel takes them."""
    query = new.latent if new.q_rope is None else new.q_rope
    return (new.latent.stride(0), new.k_rope.stride(0), *query.stride()[:2], new.rows.stride(0))


def launch(new: CacheWrite) -> None:
    """Write plain rows wherever Triton runs: on a GPU, or in its interpreter."""
    import triton

    from sglang_tpla.attention.cache_write import plain_triton as kernels

    assert new.weight is not None
    tokens, d = new.latent.shape
    if tokens == 0:
        return
    whole = triton.next_power_of_2(d)
    tile = tile_of(tokens, whole, None if new.z is not None else whole)
    programs = triton.cdiv(new.width, tile.columns) + 1 + triton.cdiv(new.heads, tile.heads)
    kernels.latent_write_kernel[(triton.cdiv(tokens, tile.tokens), programs)](
        *operands(new),
        new.rows,
        *strides(new),
        tokens,
        new.eps,
        D=d,
        W=new.width,
        ROPE=new.rope_dim,
        HEADS=new.heads,
        PROJECT=new.z is not None,
        ROTATE=kernels.rotation(new),
        BLOCK_TOKENS=tile.tokens,
        BLOCK_W=tile.columns,
        BLOCK_D=tile.latent,
        BLOCK_HEADS=tile.heads,
        HALF=triton.next_power_of_2(new.rope_dim // 2),
        num_warps=4,
    )
