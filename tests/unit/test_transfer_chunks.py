"""Chunk plans cover every value once, and rows move as a loop over single values would move them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_tpla.cache_rows.layer_rows import LayerRows, PlainRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer.chunks import Rectangle, cut, enough_bytes
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection, cut_stacks, stack_layers
from sglang_tpla.transfer.memory.rows import RowReader, RowWriter
from sglang_tpla.transfer.room import TransferError


@given(
    widths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    tokens=st.integers(0, 300),
    first=st.tuples(st.integers(0, 5), st.integers(0, 1000)),
    room=st.integers(80, 2000),
)
def test_rectangles_cover_every_value_once(widths: list[int], tokens: int, first: tuple[int, int], room: int) -> None:
    seen = np.zeros((len(widths), tokens), dtype=int)
    for item in cut(first[0], widths, first[1], tokens, 2, room):
        layers = slice(item.first_layer - first[0], item.first_layer - first[0] + item.layers)
        start = item.first_token - first[1]
        seen[layers, start : start + item.tokens] += 1
        assert item.payload_bytes == sum(widths[layers]) * item.tokens * 2
        assert 0 < item.payload_bytes <= room
    for layer, width in enumerate(widths):
        assert width == 0 or (seen[layer] == 1).all()
        assert (seen[layer] <= 1).all()


def test_a_row_larger_than_a_chunk_is_an_error() -> None:
    with pytest.raises(ValueError, match="one row of 200 bytes does not fit in a chunk of 100 bytes"):
        cut(0, [100], 0, 1, 2, 100)


@pytest.mark.parametrize(
    ("total_mib", "chunks"), [(0, 0), (1, 1), (4, 1), (10, 3), (16, 4), (60, 4), (64, 4), (100, 7)]
)
def test_a_short_prompt_of_a_gpu_has_a_chunk_for_each_stage(total_mib: int, chunks: int) -> None:
    tokens = total_mib << 10  # each of 1 KiB
    most = min(16 << 20, enough_bytes(tokens << 10, "cuda"))
    assert len(cut(0, [512], 0, tokens, 2, most)) == chunks
    assert len(cut(0, [512], 0, tokens, 2, min(16 << 20, enough_bytes(tokens << 10, "cpu")))) == -(-total_mib // 16)


@given(width=st.integers(1, 64), rope=st.integers(0, 16), data=st.data())
def test_parts_make_up_a_row(width: int, rope: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, width))
    rows = PlainRows(width, shared, rope)
    common, own = (_items(rows, part) for part in (Part.COMMON, Part.OWN))
    assert sorted(common + own) == list(range(width + rope))
    assert rows.part_items(Part.FULL) == rows.row_items == width + rope
    assert rows.part_items(Part.COMMON) == shared + rope


def _items(rows: LayerRows, part: Part) -> list[int]:
    return [item for field in rows.fields(part) for item in range(field.start, field.stop)]


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_read_then_write_equals_a_loop(dtype: torch.dtype, scattered: bool, part: Part) -> None:
    d, rope, width, shared, tokens = 24, 6, 10, 4, 33
    generator = torch.Generator().manual_seed(3)
    source = CachePool([torch.randn(80, d + rope, generator=generator).to(dtype) for _ in range(3)], d, rope, 1)
    target = CachePool([torch.zeros(90, width + rope, dtype=dtype) for _ in range(3)], d, rope, 1)
    z = Projection([torch.randn(d, width, generator=generator) for _ in range(3)], [shared] * 3)
    pick = np.random.default_rng(4)
    slots = pick.permutation(80)[:tokens] if scattered else np.arange(20, 20 + tokens)
    places = pick.permutation(90)[:tokens] if scattered else np.arange(7, 7 + tokens)
    writer = RowWriter(target.sharing(z.shared))
    size = writer.pool.payload_bytes(range(1, 3), tokens, part)
    out = np.empty(size, dtype=np.uint8)
    rectangle = Rectangle(1, 2, 0, tokens, size)
    stacks = cut_stacks(stack_layers(z.matrices, z.shared), 1, 2)
    rows = writer.pool.row_format.part(1, 2)
    RowReader(source).read(rectangle, slots, stacks, part, out, rows)
    writer.write(range(1, 3), places, part, memoryview(out))
    filled = {
        Part.FULL: range(width + rope),
        Part.COMMON: [*range(shared), *range(width, width + rope)],
        Part.OWN: range(shared, width),
    }[part]
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-4}[dtype]
    assert not target.layers[0].any()
    for layer in (1, 2):
        want = torch.zeros(90, width + rope)
        for slot, place in zip(slots, places, strict=True):
            row = source.layers[layer][slot].float()
            whole = torch.cat((row[:d] @ z.matrices[layer], row[d:]))
            for column in filled:
                want[place, column] = whole[column]
        torch.testing.assert_close(target.layers[layer].float(), want, rtol=tolerance, atol=tolerance)


def test_pool_refuses_what_does_not_fit() -> None:
    with pytest.raises(TransferError, match="at least one layer"):
        CachePool([], 8, 2, 1)
    with pytest.raises(TransferError, match=r"width in 1\.\.\.8"):
        CachePool([torch.zeros(4, 11)], 8, 2, 1)
    with pytest.raises(TransferError, match="share dtype"):
        CachePool([torch.zeros(4, 10), torch.zeros(4, 10, dtype=torch.bfloat16)], 8, 2, 1)
    with pytest.raises(TransferError, match="writable uint8"):
        MetadataRows([np.zeros((2, 2), dtype=np.int32)])
    with pytest.raises(TransferError, match="not finite"):
        Projection([torch.full((8, 2), float("nan"))], [0])


def test_projection_hashes_see_every_difference() -> None:
    matrix = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    other = matrix.clone()
    other[7, 3] += 1
    base = Projection([matrix], [2])
    assert base.content_hash == Projection([matrix.clone()], [2]).content_hash
    assert base.content_hash != Projection([matrix], [1]).content_hash
    assert base.content_hash != Projection([other], [2]).content_hash
    assert base.common_hash == Projection([other], [2]).common_hash
