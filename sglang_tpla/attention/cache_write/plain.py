"""One decode step's new cache rows in one launch: norm, projection to the slice, rope, paged write.

    z = RMSNorm(c; weight, eps) Z,    cache[slot] = [z | R(position) k_rope],    q_rope <- R(position) q_rope

(design, section 2). Stock MLA launches three kernels for it: the norm, the rotation of queries and key, the write.

The norm sees the whole latent and is rounded to the cache's dtype before it is projected, as where norm and
projection are two steps (SGLang's ``kv_a_layernorm``, ``transfer.projection.project_latent``): new rows are rounded
like transferred ones. Rotation answers to SGLang's ``DeepseekScalingRotaryEmbedding``: ``neox`` rotates halves,
otherwise neighbours; the result keeps the vector's own order. ``reference.write_latent`` is the twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_tpla.attention.interface import AttentionInputError, checked_write

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


def write_latent(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    cache: torch.Tensor,
    q_rope: torch.Tensor | None = None,
    *,
    neox: bool = False,
) -> None:
    """Write ``cache[slots]`` on a GPU.

    Args:
        latent: [tokens, d], before the norm; rows may be strided. k_rope: [tokens, rope], likewise.
        weight: [d], of the norm. eps: of the norm.
        z: [d, w] float32, contiguous; None keeps the whole latent (w = d).
        cos_sin: [positions, rope] float32, cosines then sines; None: ``k_rope`` is rotated already.
        positions: [tokens] integer, rows of ``cos_sin``.
        slots: [tokens] integer, rows of ``cache``; which of two equal slots wins is not said.
        cache: [slots, w + rope] or [slots, 1, w + rope], rows may be strided.
        q_rope: [tokens, heads, rope], tokens and heads may be strided: the queries' rope part, rotated in place where
            ``cos_sin`` is given; None rotates no queries.

    Raises:
        AttentionInputError: shapes, dtypes or a device that do not fit.
    """
    rows = checked_write(latent, k_rope, weight, z, cos_sin, positions, slots, cache, q_rope)
    if rows.device.type != "cuda":
        raise AttentionInputError(
            f"latent_write.write_latent runs on a GPU; got tensors on {rows.device}; use reference.write_latent"
        )
    launch(latent, k_rope, weight, eps, z, cos_sin, positions, slots, rows, q_rope, neox=neox)


def launch(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    q_rope: torch.Tensor | None = None,
    *,
    neox: bool,
) -> None:
    """`write_latent` unchecked, wherever Triton runs (its interpreter takes CPU tensors)."""
    import triton

    from sglang_tpla.attention.cache_write import plain_triton as kernels

    tokens, d = latent.shape
    if tokens == 0:
        return
    rope = k_rope.shape[1]
    w = rows.shape[1] - rope
    tile = tile_of(tokens, triton.next_power_of_2(d), z is not None)
    heads = 0 if q_rope is None or cos_sin is None else q_rope.shape[1]
    query = latent if q_rope is None else q_rope
    rotate = (
        kernels.ROTATE_NOT if cos_sin is None else kernels.ROTATE_HALVES if neox else kernels.ROTATE_PAIRS
    )
    programs = triton.cdiv(w, tile.columns) + 1 + triton.cdiv(heads, tile.heads)
    grid = (triton.cdiv(tokens, tile.tokens), programs)
    kernels.latent_write_kernel[grid](
        latent,
        k_rope,
        query,
        weight,
        latent if z is None else z,
        latent if cos_sin is None else cos_sin,
        slots if positions is None else positions,
        slots,
        rows,
        latent.stride(0),
        k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        tokens,
        eps,
        D=d,
        W=w,
        ROPE=rope,
        HEADS=heads,
        PROJECT=z is not None,
        ROTATE=rotate,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_W=tile.columns,
        BLOCK_D=tile.latent,
        BLOCK_HEADS=tile.heads,
        HALF=triton.next_power_of_2(rope // 2),
        num_warps=4,
    )
