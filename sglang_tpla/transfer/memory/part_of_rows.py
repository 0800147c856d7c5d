"""Makes one part of a chunk's rows with the kernels of the pool's device, one run of equal layers at a time."""

from collections.abc import Sequence
from itertools import groupby
from types import ModuleType

import torch

from sglang_tpla.cache_rows.layer_rows import WholeRows, part_width
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.memory.layer_table import LayerTable


def make_part(
    kernels: ModuleType,
    pool: LayerTable,
    latent_dim: int,
    layers: range,
    slots: torch.Tensor,
    stacks: Sequence[torch.Tensor] | None,
    part: Part,
    packed: torch.Tensor,
    row_format: RowFormat,
) -> torch.Tensor | None:
    """Fill ``packed`` (flat, of the receiver's items) with one part of the rows of some layers.

    Args:
        kernels: `row_kernels`, or their twins in `row_kernels_reference`.
        pool: ``[slots, d + rope]`` of each layer.
        latent_dim: d.
        layers: the chunk's layers, by index.
        slots: int64 ``[tokens]``.
        stacks: the projection of these layers (`projection.stack_layers`), each converted by the kernels' `weights`, or
            None for the raw latent.
        row_format: the receiver's rows of these layers.

    Returns:
        Numbers that are zero if and only if every value of sketched rows was finite; None if no rows are encoded.
    """
    position = start = 0
    if stacks is None:
        runs: list[tuple[int, torch.Tensor | None]] = [(len(list(run)), None) for _, run in groupby(row_format.layers)]
    else:
        runs = [(len(stack), stack) for stack in stacks]
    wrong = torch.empty(len(runs), dtype=torch.int32, device=packed.device) if row_format.encoded else None
    for index, (count, z) in enumerate(runs):
        rows = row_format.layers[position]
        run = range(layers.start + position, layers.start + position + count)
        position += count
        size = count * slots.numel() * rows.part_items(part)
        found = None if wrong is None else wrong[index : index + 1]
        if not size:
            if found is not None:
                found.zero_()
            continue
        out = packed[start : start + size].view(count, slots.numel(), -1)
        start += size
        columns, key = rows.part_columns(part), 0 if part is Part.OWN else rows.rope_dim
        if found is None:
            kernels.project(pool, run, slots, z, columns, latent_dim, key, out, None)
            continue
        dtype = rows.dtype if isinstance(rows, WholeRows) else torch.float32
        work = torch.empty(count, slots.numel(), part_width(rows, part) + key, dtype=dtype, device=out.device)
        kernels.project(pool, run, slots, z, columns, latent_dim, key, work, found)
        kernels.encode(rows, part, work, key, out, found)
    return wrong
