"""One decode step's new sketched cache rows in one launch: norm, projection, rotation, rounding, paged write.

As `plain`, with every part rounded straight from the float32 projection: the bytes that a transfer would have brought
(`cache_rows.sketched`). `cache_write.reference` is the twin; it also takes rows that the kernel does not.
"""

from __future__ import annotations

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import FEW_TOKENS
from sglang_tpla.cache_rows.sketched import (
    ALIGNMENT,
    INT8_LARGEST,
    LARGEST_DEVIATION,
    SketchedRows,
    midpoints,
)


def serves(rows: SketchedRows) -> bool:
    """Whether the kernel writes such rows: their fields start at even bytes."""
    return rows.alignment == ALIGNMENT


def write(new: CacheWrite) -> None:
    """Write sketched rows on a GPU.

    Raises:
        AttentionInputError: tensors on a CPU.
    """
    new.require_gpu()
    launch(new)


def launch(new: CacheWrite) -> None:
    """`write` wherever Triton runs (its interpreter takes CPU tensors)."""
    import triton

    from sglang_tpla.attention.cache_write import plain_triton as rotation
    from sglang_tpla.attention.cache_write import sketched_triton as kernels

    assert new.sketched is not None and serves(new.sketched.rows)
    kind, source, cache = new.sketched.rows, new.latent, new.rows
    tokens, d = source.shape
    if tokens == 0:
        return
    mode = kernels.GIVEN if new.weight is None else kernels.NORMED if new.z is None else kernels.PROJECTED
    few = tokens <= FEW_TOKENS or mode != kernels.PROJECTED
    block_tokens, block_heads = (1, 16) if few else (16, 4)
    query = source if new.q_rope is None else new.q_rope

    def block(columns: int) -> int:
        return max(16, triton.next_power_of_2(max(columns, 1)))

    grid = (triton.cdiv(tokens, block_tokens), 4 + triton.cdiv(new.heads, block_heads))
    kernels.sketched_write_kernel[grid](
        source,
        new.k_rope,
        query,
        source if new.weight is None else new.weight,
        source if new.z is None else new.z,
        source if new.cos_sin is None else new.cos_sin,
        new.slots if new.positions is None else new.positions,
        new.slots,
        cache.view(torch.int8),
        cache.view(torch.bfloat16),
        midpoints(kind.sketch_bits, cache.device),
        source.stride(0),
        new.k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        tokens,
        new.eps,
        LARGEST_DEVIATION[kind.sketch_bits] / INT8_LARGEST,
        SHARED=kind.shared,
        OWN=kind.own,
        GROUPS=kind.groups,
        GROUP=new.sketched.group,
        BITS=kind.sketch_bits,
        ROPE_BITS=kind.rope_bits,
        W_PAD=kind.w_pad,
        SKETCH_AT=kind.sketch_offset,
        SKETCH_BYTES=kind.sketch_bytes,
        SCALES_AT=kind.scales_offset,
        D=d,
        COLUMNS=new.sketched.columns,
        ROPE=new.rope_dim,
        HEADS=new.heads,
        MODE=mode,
        ROTATE=rotation.rotation(new),
        BLOCK_TOKENS=block_tokens,
        BLOCK_SHARED=block(kind.shared),
        BLOCK_OWN=block(kind.own),
        BLOCK_SKETCH=block(kind.groups * kind.own),
        BLOCK_D=triton.next_power_of_2(d) if mode == kernels.NORMED else 32,
        BLOCK_HEADS=block_heads,
        HALF=triton.next_power_of_2(new.rope_dim // 2),
        num_warps=4 if few else 8,
    )
