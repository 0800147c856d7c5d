"""One decode step's new cache rows in one launch: norm, projection to the slice, rope, paged write.

    z = RMSNorm(c; weight, eps) Z,    cache[slot] = [z | R(position) k_rope],    q_rope <- R(position) q_rope

(design, section 2). Stock MLA launches three kernels for it: the norm, the rotation of queries and key, the write.

The norm sees the whole latent and is rounded to the cache's dtype before it is projected, as where norm and
projection are two steps (SGLang's ``kv_a_layernorm``, ``transfer.projection.project_latent``): new rows are rounded
like transferred ones. Rotation answers to SGLang's ``DeepseekScalingRotaryEmbedding``: ``neox`` rotates halves,
otherwise neighbours; the result keeps the vector's own order. `cache_write.reference` is the twin.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_tpla.attention.cache_write.inputs import CacheWrite

FEW_TOKENS = 16  # up to here a program takes one token, beyond it four


class Tile(NamedTuple):
    """What one program takes: tokens, columns of the slice, latent values at a time, query heads. All powers of two."""

    tokens: int
    columns: int
    latent: int
    heads: int


def tile_of(tokens: int, whole: int, projects: bool) -> Tile:
    """The form that was fastest on an H100 at widths 192, 256 and 320; ``whole`` latent values, a power of two."""
    if not projects:  # nothing to share between tokens or columns
        return Tile(1, whole, whole, 16)
    return Tile(1, 16, whole, 16) if tokens <= FEW_TOKENS else Tile(4, 16, min(whole, 128), 4)


def write(new: CacheWrite) -> None:
    """Write plain rows on a GPU.

    Raises:
        AttentionInputError: tensors on a CPU.
    """
    new.require_gpu()
    launch(new)


def launch(new: CacheWrite) -> None:
    """`write` wherever Triton runs (its interpreter takes CPU tensors)."""
    import triton

    from sglang_tpla.attention.cache_write import plain_triton as kernels

    assert new.weight is not None
    tokens, d = new.latent.shape
    if tokens == 0:
        return
    rows, w, rope = new.rows, new.width, new.rope_dim
    tile = tile_of(tokens, triton.next_power_of_2(d), new.z is not None)
    query = new.latent if new.q_rope is None else new.q_rope
    programs = triton.cdiv(w, tile.columns) + 1 + triton.cdiv(new.heads, tile.heads)
    grid = (triton.cdiv(tokens, tile.tokens), programs)
    kernels.latent_write_kernel[grid](
        new.latent,
        new.k_rope,
        query,
        new.weight,
        new.latent if new.z is None else new.z,
        new.latent if new.cos_sin is None else new.cos_sin,
        new.slots if new.positions is None else new.positions,
        new.slots,
        rows,
        new.latent.stride(0),
        new.k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        tokens,
        new.eps,
        D=d,
        W=w,
        ROPE=rope,
        HEADS=new.heads,
        PROJECT=new.z is not None,
        ROTATE=kernels.rotation(new),
        BLOCK_TOKENS=tile.tokens,
        BLOCK_W=tile.columns,
        BLOCK_D=tile.latent,
        BLOCK_HEADS=tile.heads,
        HALF=triton.next_power_of_2(rope // 2),
        num_warps=4,
    )
