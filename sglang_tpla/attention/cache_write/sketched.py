"""One decode step's new sketched rows in one launch: norm, projection, rotation, quantisation, packing, paged write.

As `plain`, with every field quantised straight from the float32 projection: the bytes that a transfer would have
brought (`cache_rows.sketched`). `cache_write.reference` is the twin.
"""

from __future__ import annotations

import functools

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import FEW_TOKENS
from sglang_tpla.cache_rows import sketched as rows_format

MOST_BLOCKS = 1 << 16  # of tokens, in one launch


def serves(rows: rows_format.SketchedRows) -> bool:
    """Whether the kernel writes such rows: their fields start at even bytes."""
    return rows.alignment == rows_format.ALIGNMENT


def write(new: CacheWrite) -> None:
    """Write sketched rows on a GPU.

    Raises:
        AttentionInputError: tensors on a CPU.
    """
    new.require_gpu()
    launch(new)


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros between launches; launches of one device follow each other in one stream."""
    return torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def launch(new: CacheWrite) -> None:
    """`write` wherever Triton runs (its interpreter takes CPU tensors)."""
    import triton

    from sglang_tpla.attention.cache_write import plain_triton as rotation
    from sglang_tpla.attention.cache_write import sketched_triton as kernels

    assert new.sketched is not None and serves(new.sketched.rows)
    tokens, d = new.latent.shape
    if tokens == 0:
        return
    sizes, cache = new.sketched.rows, new.rows
    columns = new.sketched.columns
    mode = kernels.GIVEN if new.weight is None else kernels.NORMED if new.z is None else kernels.PROJECTED
    whole = triton.next_power_of_2(d)
    if mode != kernels.PROJECTED:
        block_tokens, block_w, block_d, block_heads = 1, triton.next_power_of_2(columns), whole, 16
    elif tokens <= FEW_TOKENS:
        block_tokens, block_w, block_d, block_heads = 1, 16, whole, 16
    else:
        block_tokens, block_w, block_d, block_heads = 4, 16, min(whole, 128), 4
    query = new.latent if new.q_rope is None else new.q_rope
    work = torch.empty(tokens, columns, dtype=torch.float32, device=cache.device)
    programs = triton.cdiv(columns, block_w) + triton.cdiv(new.heads, block_heads)
    bits = sizes.sketch_bits
    kernels.sketched_write_kernel[(triton.cdiv(tokens, block_tokens), programs)](
        new.latent,
        new.k_rope,
        query,
        new.latent if new.weight is None else new.weight,
        new.latent if new.z is None else new.z,
        new.latent if new.cos_sin is None else new.cos_sin,
        new.slots if new.positions is None else new.positions,
        new.slots,
        cache,
        cache.view(torch.bfloat16),
        work,
        _counters(cache.device),
        rows_format.midpoints(bits, cache.device),
        new.latent.stride(0),
        new.k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        tokens,
        new.eps,
        rows_format.LARGEST_DEVIATION[bits] / rows_format.INT8_LARGEST,
        D=d,
        COLUMNS=columns,
        SHARED=sizes.shared,
        OWN=sizes.own,
        GROUPS=sizes.groups,
        GROUP=new.sketched.group,
        BITS=bits,
        ROPE=sizes.rope_dim,
        ROPE_BITS=sizes.rope_bits,
        W_PAD=sizes.w_pad,
        SCALES=sizes.scales_offset,
        HEADS=new.heads,
        MODE=mode,
        ROTATE=rotation.rotation(new),
        BLOCK_TOKENS=block_tokens,
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        BLOCK_HEADS=block_heads,
        HALF=triton.next_power_of_2(max(1, sizes.rope_dim // 2)),
        BLOCK_SHARED=triton.next_power_of_2(max(16, sizes.shared)),
        BLOCK_OWN=triton.next_power_of_2(max(16, sizes.own)),
        BLOCK_SKETCH=triton.next_power_of_2(max(16, sizes.sketch_columns)),
        num_warps=4,
    )
