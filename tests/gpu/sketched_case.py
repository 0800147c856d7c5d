"""Writes of sketched rows by the kernel and by its twin, for CPU (interpreted) and GPU tests."""

import torch
from write_case import random_write

from sglang_tpla.attention.cache_write import reference, sketched
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.sketched import SketchedRows, unpack_rows

KINDS = [
    GroupRows(SketchedRows.of(256, 1, 256, 8), 0),
    GroupRows(SketchedRows.of(256, 2, 32, 30), 1),
    GroupRows(SketchedRows.of(320, 4, 64, 64, sketch_bits=3, rope_bits=8), 2),
    GroupRows(SketchedRows.of(264, 2, 24, 62, sketch_bits=2), 0),
    GroupRows(SketchedRows.of(346, 3, 10, 64, rope_bits=8), 1),
    GroupRows(SketchedRows.of(240, 2, 240, 16), 1),
]
DEEPSEEK = [GroupRows(SketchedRows.of(512, g, 64, 64), g - 1) for g in (1, 2, 4, 8, 16)]


def difference(
    kind: GroupRows,
    tokens: int,
    rotate: str | None,
    dtype: torch.dtype,
    device: str,
    few: float,
    projected: bool = True,
) -> str | None:
    """Return how kernel and twin differ beyond rounding, or None.

    A code on a border may fall on either side, in at most a share ``few`` of the bytes. Rows of one group need not be
    ``projected``; without projection, their columns are the normed latent.
    """
    rows, width = kind.rows, kind.columns if projected else None
    cases = [
        random_write(tokens, rows.latent_dim, width, rows.rope_dim, rotate is not None, dtype, 5, device, 5)
        for _ in "ab"
    ]
    caches = [torch.full((len(case.cache), 1, rows.row_bytes), 255, dtype=torch.uint8, device=device) for case in cases]
    for write, case, cache in zip((reference.write, sketched.launch), cases, caches, strict=True):
        write(case.write(1e-6, rotate, cache=cache, sketched=kind))
    keys = [unpack_rows(rows, cache[case.slots, 0]).k_rope for cache, case in zip(caches, cases, strict=True)]
    if not torch.allclose(*keys, rtol=2**-7, atol=2**-6):
        return f"keys of {rows}, {tokens} tokens, {rotate}"
    apart = caches[0] != caches[1]
    if rows.rope_bits == 16:  # these keys were compared as values
        apart[..., rows.rope_offset : rows.rope_offset + rows.rope_bytes] = False
    if apart.float().mean() > few:
        places = apart.any(0).any(0).nonzero().flatten().tolist()
        return f"{apart.float().mean():.4f} of the bytes of {rows}, {tokens} tokens, {rotate}: {places[:40]}"
    if not torch.allclose(*(case.q_rope.float() for case in cases), rtol=2**-7, atol=2**-7):
        return f"queries of {rows}, {tokens} tokens, {rotate}"
    return None


def difference_of_odd_values(kind: GroupRows, device: str) -> str | None:
    """Return how kernel and twin differ on rows of zeros, of one huge value and of very small values, or None.

    The rows are written from finished columns.
    """
    rows = kind.rows
    z, key = torch.randn(4, kind.columns, device=device), torch.randn(4, rows.rope_dim, device=device)
    z[1], key[1], z[2, 3] = 0, 0, 3e38
    z[3] *= 1e-30
    caches = [torch.full((4, rows.row_bytes), 255, dtype=torch.uint8, device=device) for _ in "ab"]
    for write, cache in zip((reference.write, sketched.launch), caches, strict=True):
        write(CacheWrite(z, key.bfloat16().float(), torch.arange(4, device=device), cache, sketched=kind))
    if torch.equal(*caches):
        return None
    return f"odd values of {rows}: {(caches[0] != caches[1]).nonzero()[:20].tolist()}"


def unseen(kind: GroupRows, device: str) -> str | None:
    """Return which field of a row has a finite scale although one of its values is not finite, or None."""
    rows = kind.rows
    block = ((kind.group + 1) % rows.groups) * rows.own  # another group's block
    columns = {0: 1 if rows.shared > 1 else None, 1: rows.shared + 1, 2: rows.w + block + 1} if rows.own else {0: 1}
    if rows.rope_bits == 8:
        columns[3] = 1
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7F800000):  # NaN, NaN as a GPU makes it, infinity
        odd = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
        for field, column in columns.items():
            if column is None:
                continue
            z, key = torch.randn(2, kind.columns, device=device), torch.randn(2, rows.rope_dim, device=device)
            (key if field == 3 else z)[1, column] = odd
            cache = torch.zeros(2, rows.row_bytes, dtype=torch.uint8, device=device)
            sketched.launch(CacheWrite(z, key, torch.arange(2, device=device), cache, sketched=kind))
            scales = cache[:, rows.scales_offset :].contiguous().view(torch.bfloat16)
            if bool(scales[1, field].isfinite()) or not bool(scales[0].isfinite().all()):
                return f"field {field} of {rows}, a value {bits:#x}: scales {scales.tolist()}"
    return None
