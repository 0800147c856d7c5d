"""Write one decode step's new sketched rows in one launch: norm, projection, rotation, quantisation, packing, write.

The kernel quantises every field straight from the float32 projection: these are the bytes that a transfer would have
brought (`cache_rows.sketched`). `plain` describes the other steps.
"""

import functools

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import operands, strides, tile_of
from sglang_tpla.cache_rows import sketched as rows_format

MOST_BLOCKS = 1 << 16  # of tokens, in one launch


def serves(rows: rows_format.SketchedRows) -> bool:
    """Whether the kernel writes such rows: their fields start at even bytes."""
    return rows.alignment == rows_format.ALIGNMENT


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Return counters that are zero between launches; launches of one device follow each other in one stream."""
    return torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def launch(new: CacheWrite) -> None:
    """Write sketched rows wherever Triton runs: on a GPU, or in its interpreter."""
    import triton

    from sglang_tpla.attention.cache_write import sketched_triton as kernels
    from sglang_tpla.attention.cache_write.plain_triton import mode, rotation

    assert new.sketched is not None and serves(new.sketched.rows)
    tokens, d = new.latent.shape
    if tokens == 0:
        return
    sizes, cache, columns = new.sketched.rows, new.rows, new.sketched.columns
    tile = tile_of(tokens, triton.next_power_of_2(d), triton.next_power_of_2(columns) if new.z is None else None)
    programs = triton.cdiv(columns, tile.columns) + triton.cdiv(new.heads, tile.heads)
    bits = sizes.sketch_bits
    kernels.sketched_write_kernel[(triton.cdiv(tokens, tile.tokens), programs)](
        *operands(new),
        cache,
        cache.view(torch.bfloat16),
        torch.empty(tokens, columns, dtype=torch.float32, device=cache.device),
        _counters(cache.device),
        rows_format.midpoints(bits, cache.device),
        *strides(new),
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
        TURN=sizes.turn(new.sketched.group),
        HEADS=new.heads,
        MODE=mode(new),
        ROTATE=rotation(new),
        BLOCK_TOKENS=tile.tokens,
        BLOCK_W=tile.columns,
        BLOCK_D=tile.latent,
        BLOCK_HEADS=tile.heads,
        HALF=triton.next_power_of_2(max(1, sizes.rope_dim // 2)),
        BLOCK_SHARED=triton.next_power_of_2(max(16, sizes.shared)),
        BLOCK_OWN=triton.next_power_of_2(max(16, sizes.own)),
        BLOCK_SKETCH=triton.next_power_of_2(max(16, sizes.sketch_columns)),
        num_warps=4,
    )
