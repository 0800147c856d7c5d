"""One decode step's new FP8 cache rows in one launch: norm, projection, rotation, quantisation, paged write.

As `plain`, with the slice quantised straight from the float32 projection and the key in bfloat16: the bytes that a
transfer would have brought (`cache_rows.fp8`). `cache_write.reference` is the twin.
"""

from __future__ import annotations

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import FEW_TOKENS
from sglang_tpla.attention.interface import AttentionInputError
from sglang_tpla.cache_rows import fp8 as fp8_rows


def write(new: CacheWrite) -> None:
    """Write FP8 rows on a GPU.

    Raises:
        AttentionInputError: tensors on a CPU, or rows that do not begin at multiples of 16 bytes.
    """
    new.require_gpu()
    launch(new)


def launch(new: CacheWrite) -> None:
    """`write` wherever Triton runs (its interpreter takes CPU tensors)."""
    import triton

    from sglang_tpla.attention.cache_write import fp8_triton as kernels
    from sglang_tpla.attention.cache_write import plain_triton as rotation

    assert new.fp8_shared is not None
    source, rows, shared = new.latent, new.rows, new.fp8_shared
    tokens, d = source.shape
    if tokens == 0:
        return
    if rows.data_ptr() % fp8_rows.ALIGNMENT or rows.stride(0) % fp8_rows.ALIGNMENT:
        raise AttentionInputError(
            f"FP8 rows must start at 16-byte borders; got strides {rows.stride()}; pass a contiguous cache"
        )
    rope, w = new.rope_dim, new.width
    mode = kernels.GIVEN if new.weight is None else kernels.NORMED if new.z is None else kernels.PROJECTED
    few = tokens <= FEW_TOKENS or mode != kernels.PROJECTED
    block_tokens, block_heads = (1, 16) if few else (16, 4)
    query = source if new.q_rope is None else new.q_rope
    kernels.fp8_write_kernel[(triton.cdiv(tokens, block_tokens), 3 + triton.cdiv(new.heads, block_heads))](
        source,
        new.k_rope,
        query,
        source if new.weight is None else new.weight,
        source if new.z is None else new.z,
        source if new.cos_sin is None else new.cos_sin,
        new.slots if new.positions is None else new.positions,
        new.slots,
        rows.view(fp8_rows.FP8),
        rows.view(torch.bfloat16),
        rows.view(torch.float32),
        source.stride(0),
        new.k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        tokens,
        new.eps,
        SHARED=shared,
        D=d,
        W=w,
        ROPE=rope,
        HEADS=new.heads,
        MODE=mode,
        ROTATE=rotation.rotation(new),
        BLOCK_TOKENS=block_tokens,
        BLOCK_SHARED=max(16, triton.next_power_of_2(max(shared, 1))),
        BLOCK_OWN=max(16, triton.next_power_of_2(max(w - shared, 1))),
        BLOCK_D=triton.next_power_of_2(d) if mode == kernels.NORMED else 32,
        BLOCK_HEADS=block_heads,
        HALF=triton.next_power_of_2(rope // 2),
        num_warps=4 if few else 8,
    )
