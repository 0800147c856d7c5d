"""The kernels that make a chunk from a pool's rows on a GPU, and that write a chunk into a pool.

    project   pool rows of some layers -> [projected columns | rotary key], in float32 or as plain rows
    encode    these in float32         -> the bytes of one part of sketched rows
    scatter   a payload                -> pool rows of some layers

Each kernel is launched once for all layers of a chunk that have equal row formats, because a prompt that is computed
meanwhile leaves a multiprocessor free only now and then, and every launch waits for that. `row_kernels_reference` has
the kernels' twins, which document the arguments. The caller chooses the stream.
"""

import functools
import math
from typing import NamedTuple

import torch

from sglang_tpla.cache_rows import sketched as rows_format
from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows, part_width
from sglang_tpla.cache_rows.parts import Field, Part
from sglang_tpla.transfer.memory.layer_table import INTEGERS, LayerTable

Z_PARTS = 3  # bfloat16 numbers that a float32 weight is cut into, which hold all of its bits
X_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # the same for a value of the pool
FEW_TOKENS = 64  # up to so many tokens, `tile_of` chooses the small tile
LONGEST_BYTES = 8  # the most that `scatter` moves at a time


class Tile(NamedTuple):
    """One program's share of a projection: tokens, columns, latent values at a time, and its warps."""

    tokens: int
    columns: int
    latent: int
    warps: int


def tile_of(tokens: int) -> Tile:
    return Tile(16, 64, 64, 4) if tokens <= FEW_TOKENS else Tile(128, 128, 32, 8)


def weights(z: torch.Tensor) -> torch.Tensor:
    """Return a projection ``[layers, d, columns]`` for `project`, as bfloat16 ``[layers, Z_PARTS, d, columns]``.

    The parts sum up to the float32 number: each part is the truncated remainder of the parts before it.
    """
    parts = []
    for _ in range(Z_PARTS):
        part = (z.view(torch.int32) & -65536).view(torch.float32)
        parts.append(part.to(torch.bfloat16))
        z = z - part
    return torch.stack(parts, dim=1)


def project(
    pool: LayerTable,
    layers: range,
    slots: torch.Tensor,
    z: torch.Tensor | None,
    columns: tuple[slice, ...],
    latent_dim: int,
    key: int,
    out: torch.Tensor,
    wrong: torch.Tensor | None,
) -> None:
    import triton

    from sglang_tpla.transfer.memory import row_kernels_triton as kernels

    if z is None and out.dtype == pool.dtype:  # copied as integers, which keep every bit
        pool = pool.as_integers(out.element_size())
        out = out.view(pool.dtype)
    width, tokens = out.shape[-1] - key, slots.numel()
    if z is None:
        first, count, second = 0, width, 0
        tile = Tile(16, triton.next_power_of_2(max(16, width)), 64, 4)
    else:
        first, count, second = _runs(columns, z.shape[-1])
        tile = tile_of(tokens)
    blocks = triton.cdiv(count, tile.columns) + triton.cdiv(width - count, tile.columns)
    kernels.project_kernel[(triton.cdiv(tokens, tile.tokens), blocks + (key > 0), len(layers))](
        pool[0], pool.places, slots, pool[0] if z is None else z, out, slots if wrong is None else wrong,
        layers.start, tokens,
        D=latent_dim,
        COLUMNS=width,
        FIRST=first,
        COUNT=count,
        SECOND=second,
        Z_COLUMNS=0 if z is None else z.shape[-1],
        KEY=key,
        PROJECTED=z is not None,
        CLEARED=wrong is not None,
        X_PARTS=X_PARTS.get(pool.dtype, Z_PARTS),
        Z_PARTS=Z_PARTS,
        OPERAND=triton.language.bfloat16 if out.is_cuda else triton.language.float32,
        ALIGNED=pool.aligned,
        Z_ALIGNED=1 if z is None else math.gcd(8, first, second, z.shape[-1]),
        BLOCK_TOKENS=tile.tokens,
        BLOCK_W=tile.columns,
        BLOCK_D=tile.latent,
        BLOCK_KEY=triton.next_power_of_2(max(16, key)),
        num_warps=tile.warps,
    )  # fmt: skip


def _runs(columns: tuple[slice, ...], width: int) -> tuple[int, int, int]:
    """Return the start and the length of the first of at most two runs of columns, and the start of the second."""
    first, *second = (range(width)[run] for run in columns)
    return first.start, len(first), second[0].start if second else 0


def encode(rows: LayerRows, part: Part, work: torch.Tensor, key: int, out: torch.Tensor, wrong: torch.Tensor) -> None:
    import triton

    from sglang_tpla.transfer.memory import row_kernels_triton as kernels

    if not isinstance(rows, GroupRows):
        out.copy_(work.view(torch.uint8))
        return
    if not rows.rows.own or part is Part.FULL:  # no field fills some of the bytes
        out.copy_(_row_of_zeros(rows, part, out.device))
    sizes, scale = rows.rows, rows_format.SCALE_BYTES
    common, own, whole = part is Part.COMMON, part is Part.OWN, part is Part.FULL
    key_to = sizes.turns * sizes.shared if common else sizes.rope_offset
    sketch_to = key_to + (sizes.key_turns if common else 1) * sizes.rope_bytes
    scales = sketch_to + sizes.groups * sizes.block_bytes if common else sizes.scales_offset
    shared, mine = 0 if own else sizes.shared, 0 if common else sizes.own
    sketch = 0 if own else sizes.groups * sizes.own
    kernels.encode_kernel[(out.numel() // out.shape[-1], 4)](
        work, out, wrong, rows_format.STEP[sizes.sketch_bits], rows_format.REACH[sizes.sketch_bits],
        WIDTH=work.shape[-1],
        ROW_BYTES=out.shape[-1],
        SHARED=shared,
        SHARED_SCALE=-1 if own else scales,
        TURN=sizes.turn(0 if common else rows.group),
        TWICE=common and sizes.turns == 2,
        OWN=mine,
        OWN_TO=shared,
        OWN_SCALE=mine if own else scales + scale,
        SKETCH=sketch,
        SKETCH_TO=sketch_to,
        SKETCH_SCALE=scales + (2 if whole else 1) * scale,
        SKIP=rows.group * sizes.own if whole else sketch,
        SKIPPED=sizes.own if whole else 0,
        BITS=sizes.sketch_bits,
        KEY=key,
        KEY_TO=key_to,
        KEY_SCALE=-1 if own else scales + (3 if whole else 2) * scale,
        KEY_BITS=sizes.rope_bits,
        KEY_TWICE=common and sizes.key_turns == 2,
        BLOCK_SHARED=triton.next_power_of_2(max(16, shared)),
        BLOCK_OWN=triton.next_power_of_2(max(16, mine)),
        BLOCK_SKETCH=triton.next_power_of_2(max(16, sketch)),
        BLOCK_KEY=triton.next_power_of_2(max(16, key)),
        num_warps=1,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _row_of_zeros(rows: GroupRows, part: Part, device: torch.device) -> torch.Tensor:
    """Return one part of an encoded row of zeros, uint8 ``[items of the part]``, made once per device."""
    out = torch.empty(rows.part_items(part), dtype=torch.uint8, device="cpu")
    columns = part_width(rows, part)
    zeros = torch.zeros(columns + rows.rope_dim, device="cpu")
    rows.encode(zeros[:columns], zeros[columns:], part, out)
    return out.to(device)


def scatter(
    pool: LayerTable, layers: range, slots: torch.Tensor, fields: tuple[Field, ...], payload: torch.Tensor
) -> None:
    import triton

    from sglang_tpla.transfer.memory import row_kernels_triton as kernels

    # move the longest items that divide every field's offsets and sizes
    item = payload.element_size()
    sizes = [number for field in fields for number in (field.start, field.stop, field.payload)]
    sizes += [payload.shape[2], int(payload.storage_offset())]
    unit = math.gcd(LONGEST_BYTES, item * math.gcd(*sizes), item * pool.aligned)
    pool, payload = pool.as_integers(unit), payload.view(INTEGERS[unit])
    moves = _moves(fields, unit // item if unit > item else 1, payload.device)
    block = min(256, triton.next_power_of_2(moves.shape[0]))
    kernels.scatter_kernel[
        (triton.cdiv(slots.numel(), 16), triton.cdiv(moves.shape[0], block), len(layers))
    ](
        payload, moves, pool[0], pool.places, slots, layers.start, slots.numel(),
        ITEMS=payload.shape[2],
        COUNT=moves.shape[0],
        BLOCK_TOKENS=16,
        BLOCK=block,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _moves(fields: tuple[Field, ...], unit_items: int, device: torch.device) -> torch.Tensor:
    """Return each move's source in a payload and target in a row, in units of ``unit_items``: int32 ``[moves, 2]``."""
    moves = [
        ((field.payload + item) // unit_items, (field.start + item) // unit_items)
        for field in fields
        for item in range(0, field.size, unit_items)
    ]
    return torch.tensor(moves, dtype=torch.int32, device=device)
