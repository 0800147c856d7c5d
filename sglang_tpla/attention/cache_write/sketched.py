"""Write one decode step's new sketched rows in two launches: norm and projection; then rotation, quantisation, packing.

The second kernel quantises every field straight from the float32 projection, so its bytes equal those that a transfer
would have brought (`cache_rows.sketched`). If nothing is projected, the second kernel runs alone. `plain` describes the
other steps.
"""

from typing import NamedTuple

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import operands, strides
from sglang_tpla.cache_rows import sketched as rows_format

HOPPER = (9, 0)  # the first GPU that can start a kernel while its predecessor still runs
MOST_LATENT = 1024  # values of a latent that one program can hold together with the weights of some columns
FEW_TOKENS = 32  # this many tokens do not fill the GPU
BLOCK_HEADS = 16  # query heads of a token, rotated by one program
Z_PARTS = 3  # a float32 weight is cut into this many bfloat16 numbers, which hold all of its bits


class ProjectionTile(NamedTuple):
    """One program's share of the projection: tokens, columns, parts of the sum over the latent, warps.

    With ``late``, the next kernel starts after this one's loads, not before them.
    """

    tokens: int
    columns: int
    splits: int
    warps: int
    late: bool = False


def tile_of(tokens: int, latent_dim: int, sketch: bool) -> ProjectionTile:
    """Return the tile of the projection; measured on an H200 (benchmarks/results/h200/SKETCHED_NOTES.md)."""
    if tokens <= 2 and latent_dim <= 512:
        return ProjectionTile(1, 16, 1, 4)
    if tokens <= 16 and latent_dim <= 512:  # 32 columns of a longer latent are more than registers hold
        return ProjectionTile(1, 32, 1, 4, late=sketch)
    if tokens <= 8:
        return ProjectionTile(1, 16, 1, 4)
    few = tokens <= 64 or latent_dim > 512  # a program holds all of its tokens' latents
    if few:
        return ProjectionTile(16, 16, 8, 4 if tokens <= FEW_TOKENS else 8)
    return ProjectionTile(32, 32, 8, 8)


def serves(rows: rows_format.SketchedRows) -> bool:
    """Return whether the kernels can write such rows: their fields must start at even bytes."""
    return rows.alignment == rows_format.ALIGNMENT and rows.latent_dim <= MOST_LATENT


def launch(new: CacheWrite) -> None:
    """Write sketched rows wherever Triton runs: on a GPU, or in its interpreter."""
    import triton

    from sglang_tpla.attention.cache_write import sketched_triton as kernels
    from sglang_tpla.attention.cache_write.plain_triton import rotation

    assert new.sketched is not None and serves(new.sketched.rows)
    if new.tokens == 0:
        return
    sizes, cache, columns = new.sketched.rows, new.rows, new.sketched.columns
    latent, k_rope, q_rope, weight, z, cos_sin, positions, slots = operands(new)
    latent_stride, *other_strides = strides(new)
    follows = False
    if new.z is not None:
        follows = cache.is_cuda and torch.cuda.get_device_capability(cache.device) >= HOPPER
        work = torch.empty(new.tokens, columns, dtype=torch.float32, device=cache.device)
        tile = tile_of(new.tokens, latent.shape[1], sizes.own > 0)
        kernels.projection_kernel[(triton.cdiv(new.tokens, tile.tokens), triton.cdiv(columns, tile.columns))](
            latent, weight, z, work, latent_stride, new.tokens, new.eps,
            D=latent.shape[1],
            COLUMNS=columns,
            X_PARTS={torch.bfloat16: 1, torch.float16: 2}.get(latent.dtype, Z_PARTS),
            Z_PARTS=Z_PARTS,
            OPERAND=triton.language.bfloat16 if cache.is_cuda else triton.language.float32,
            FOLLOWED=follows,
            LATE=tile.late,
            BLOCK_TOKENS=tile.tokens,
            BLOCK_W=tile.columns,
            SPLITS=tile.splits,
            BLOCK_D=triton.next_power_of_2(max(16, triton.cdiv(latent.shape[1], tile.splits))),
            num_warps=tile.warps,
        )  # fmt: skip
        latent, latent_stride = work, columns
    fields = 3 if sizes.own else 1
    block_shared, block_own, block_sketch = (
        triton.next_power_of_2(max(16, field)) for field in (sizes.shared, sizes.own, sizes.sketch_columns)
    )
    kernels.rows_kernel[(new.tokens, fields + 1 + triton.cdiv(new.heads, BLOCK_HEADS))](
        latent, k_rope, q_rope, weight, cos_sin, positions, slots, cache, cache.view(torch.bfloat16),
        latent_stride, *other_strides, new.eps,
        rows_format.STEP[sizes.sketch_bits], rows_format.REACH[sizes.sketch_bits],
        COLUMNS=columns,
        SHARED=sizes.shared,
        OWN=sizes.own,
        GROUPS=sizes.groups,
        GROUP=new.sketched.group,
        BITS=sizes.sketch_bits,
        ROPE=sizes.rope_dim,
        ROPE_BITS=sizes.rope_bits,
        W_PAD=sizes.w_pad,
        SCALES=sizes.scales_offset,
        TURN=sizes.turn(new.sketched.group),
        HEADS=new.heads,
        NORMED=new.weight is not None and new.z is None,
        ROTATE=rotation(new),
        FOLLOWS=follows,
        BLOCK_COLUMNS=triton.next_power_of_2(columns),
        BLOCK_HEADS=BLOCK_HEADS,
        HALF=triton.next_power_of_2(max(1, sizes.rope_dim // 2)),
        BLOCK_SHARED=block_shared,
        BLOCK_OWN=block_own,
        BLOCK_SKETCH=block_sketch,
        # Few tokens do not fill the GPU, so 8 warps work on a field: a thread has two columns of the longest field.
        num_warps=8 if new.tokens <= FEW_TOKENS and max(block_shared, block_sketch) >= 512 else 4,
        launch_pdl=follows,
    )  # fmt: skip
