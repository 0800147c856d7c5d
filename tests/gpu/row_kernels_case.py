"""Chunks made and put into pools by `row_kernels` and by their twins, for CPU (interpreted) and GPU tests."""

import itertools

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows, PlainRows, WholeRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.transfer.memory import row_kernels, row_kernels_reference
from sglang_tpla.transfer.memory.layer_table import LayerTable
from sglang_tpla.transfer.memory.part_of_rows import make_part

# The rows of successive layers, and whether they are projected.
SMALL: list[tuple[list[LayerRows], bool]] = [
    ([PlainRows(24, 24, 6)] * 2, False),
    ([PlainRows(17, 5, 6), PlainRows(17, 5, 6), PlainRows(9, 0, 6)], True),
    ([PlainRows(24, 0, 0)], True),
    ([GroupRows(SketchedRows.of(24, 1, 24, 6), 0)] * 2, False),
    ([GroupRows(SketchedRows.of(24, 1, 24, 0, rope_bits=8), 0)], True),
    ([GroupRows(SketchedRows.of(24, 2, 8, 6), 1), WholeRows(24, 6, torch.float32)], True),
    ([GroupRows(SketchedRows.of(40, 4, 8, 4, sketch_bits=3, rope_bits=8), 2)] * 3, True),
    ([GroupRows(SketchedRows.of(31, 3, 7, 2, sketch_bits=2), 0)], True),
    ([GroupRows(SketchedRows.of(32, 2, 0, 6, rope_bits=8), 0)], True),
]
DEEPSEEK: list[tuple[list[LayerRows], bool]] = [
    ([PlainRows(512, 512, 64)] * 5, False),
    ([PlainRows(320, 64, 64)] * 2 + [PlainRows(256, 64, 64)], True),
    *(([GroupRows(SketchedRows.of(512, g, 64, 64), g - 1)] * 3, True) for g in (1, 2, 4, 8)),
    ([GroupRows(SketchedRows.of(512, 2, 64, 64), 0)] * 2 + [WholeRows(512, 64, torch.bfloat16)], True),
    ([GroupRows(SketchedRows.of(512, 2, 128, 64, sketch_bits=3, rope_bits=8), 1)] * 2, True),
]


def wrong_chunk(
    rows: list[LayerRows], projected: bool, tokens: int, dtype: torch.dtype, device: str, few: float
) -> str | None:
    """Return how a chunk's parts, or the items put into a pool, differ between kernels and twins beyond rounding.

    A code on a border may fall on either side, in at most a share ``few`` of the bytes; so may one row's scale, with
    all of its codes. Values rounded to the pool's dtype may differ by one step of it.
    """
    generator = torch.Generator().manual_seed(tokens)
    d, rope, row_format = (
        rows[0].width if not projected else latent_of(rows[0]),
        rows[0].rope_dim,
        RowFormat(tuple(rows)),
    )
    # The distance between rows is larger than a row, and the pool has a layer before the chunk.
    pool = [torch.randn(2 * tokens + 3, d + rope + 8, generator=generator) for _ in range(len(rows) + 1)]
    table = LayerTable([layer.to(device, dtype)[:, : d + rope] for layer in pool])
    slots = torch.randperm(2 * tokens + 3, generator=generator)[:tokens].to(device)
    layers = range(1, len(rows) + 1)
    stacks = None
    if projected:
        groups = [list(run) for _, run in itertools.groupby(rows)]
        stacks = [torch.randn(len(run), d, run[0].columns, generator=generator).to(device) for run in groups]
        for run, z in zip(groups, stacks, strict=True):
            if isinstance(run[0], WholeRows):  # a draft's layer, of which every bit is sent
                z[:] = torch.eye(d)
    for part in Part:
        if not projected and part is Part.OWN:
            continue
        items = tokens * sum(row.part_items(part) for row in rows)
        made = [torch.full((items,), 0, dtype=row_format.item_dtype(dtype), device=device) for _ in "ab"]
        for kernels, packed in zip((row_kernels_reference, row_kernels), made, strict=True):
            given = None if stacks is None else [kernels.weights(z) for z in stacks]
            wrong = make_part(kernels, table, d, layers, slots, given, part, packed, row_format)
            if wrong is not None and wrong.any():
                return f"{part.name} of {rows}: {kernels.__name__} found values that are not finite"
        if not projected and not row_format.encoded and not torch.equal(*made):
            return f"{part.name} of {rows}: what was only copied differs"
        apart = int((made[0] != made[1]).sum())
        if row_format.encoded and apart > few * items + items / (tokens * len(rows)):
            return f"{part.name} of {rows}, {tokens} tokens: {apart} of {items} bytes differ"
        # Tensor cores add less exactly than float32, in proportion to the largest sums.
        tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5}[dtype]
        if not row_format.encoded and items:
            largest, error = made[0].float().abs().max(), (made[0].float() - made[1].float()).abs().max()
            if error > tolerance * largest:
                return f"{part.name} of {rows}, {tokens} tokens: {error} of {largest}"
        if (different := wrong_rows(rows, tokens, part, made[0])) is not None:
            return different
    return None


def latent_of(rows: LayerRows) -> int:
    """Return the number of latent columns of the model that has these rows."""
    return rows.rows.latent_dim if isinstance(rows, GroupRows) else 24 if rows.width < 64 else 512


def wrong_rows(rows: list[LayerRows], tokens: int, part: Part, payload: torch.Tensor) -> str | None:
    """Return how kernel and twin put a part into different items of a pool, or None if they do not."""
    start = 0
    for row, run in itertools.groupby(rows):
        count, items = len(list(run)), row.part_items(part)
        values = payload[start : start + count * tokens * items].view(count, tokens, items)
        start += values.numel()
        if not row.fields(part):
            continue
        slots = torch.randperm(tokens + 5, generator=torch.Generator().manual_seed(1))[:tokens].to(payload.device)
        layers = [torch.full((tokens + 5, row.row_items), 7, dtype=payload.dtype) for _ in range(count + 1)]
        pools = [LayerTable([layer.to(payload.device, copy=True) for layer in layers]) for _ in "ab"]
        for kernels, pool in zip((row_kernels_reference, row_kernels), pools, strict=True):
            kernels.scatter(pool, range(1, count + 1), slots, row.fields(part), values)
        for layer in range(count + 1):
            if not torch.equal(pools[0][layer], pools[1][layer]):
                return f"{part.name} of {row}, {tokens} tokens: layer {layer} of the pool differs"
    return None


def unseen(tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Return which value that is not finite was overlooked, or None."""
    row = GroupRows(SketchedRows.of(40, 4, 8, 4), 1)
    z, slots = torch.randn(2, 40, row.columns, device=device), torch.arange(tokens, device=device)
    for odd, place in itertools.product((float("nan"), float("inf"), -float("inf")), (0, 17, 39, 40, 43)):
        pool = [torch.randn(tokens, 44, device=device).to(dtype) for _ in range(2)]
        pool[1][tokens - 1, place] = odd
        for part in (Part.FULL, Part.COMMON):
            packed = torch.empty(2 * tokens * row.part_items(part), dtype=torch.uint8, device=device)
            rows = RowFormat((row, row))
            for kernels in (row_kernels_reference, row_kernels):
                given = [kernels.weights(z)]
                wrong = make_part(kernels, LayerTable(pool), 40, range(2), slots, given, part, packed, rows)
                if wrong is None or not wrong.any():
                    return f"{kernels.__name__}: {odd} at {place} of {tokens} tokens, {part.name}"
    return None
