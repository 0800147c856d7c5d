"""Extents hold all rows in order, and the arithmetic on pieces of memory is right."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tpla.transfer.memory import iovec

SLOTS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=8).map(
    lambda pairs: np.concatenate([np.arange(first, first + count) for first, count in pairs])
)


@settings(deadline=None)
@given(slots=SLOTS)
def test_extents_are_as_long_as_can_be(slots: np.ndarray) -> None:
    extents = iovec.find_extents(slots)
    assert [slot + step for slot, rows in extents.tolist() for step in range(rows)] == slots.tolist()
    assert all(first + rows != second for (first, rows), (second, _) in itertools.pairwise(extents.tolist()))


def test_nothing_has_no_extents() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert iovec.find_extents(nothing).shape == (0, 2)


@given(rows=st.integers(0, 500), row_bytes=st.integers(0, 200_000))
def test_blocks_cover_every_row_once(rows: int, row_bytes: int) -> None:
    covered = [list(range(rows))[block] for block in iovec.blocks(rows, row_bytes)]
    assert [row for block in covered for row in block] == list(range(rows))
    assert all(len(block) == 1 or len(block) * row_bytes <= iovec.BLOCK_BYTES for block in covered)


@settings(deadline=None)
@given(slots=SLOTS, data=st.data())
def test_pieces_of_a_pool_are_its_rows(slots: np.ndarray, data: st.DataObject) -> None:
    layers = [np.random.default_rng(seed).integers(0, 256, (60, 6), dtype=np.uint8) for seed in range(2)]
    want = b"".join(layer[slots].tobytes() for layer in layers)
    pieces = iovec.Layers([layers[0], *layers]).pieces(range(1, 3), iovec.find_extents(slots))
    assert pieces.table.flags.c_contiguous
    assert b"".join(pieces.views) == want
    assert pieces.size_bytes == len(want)
    assert [view.nbytes for view in pieces.views] == pieces.table[:, 1].tolist()
    cursor, read = iovec.Cursor(pieces), b""
    while read != want:
        limit = data.draw(st.integers(1, 4))
        ahead = b"".join(cursor.ahead(data.draw(st.integers(1, 100)), limit))
        assert ahead and want[len(read) :].startswith(ahead)
        taken = data.draw(st.integers(1, len(ahead)))
        read += ahead[:taken]
        cursor.advance(taken)
    assert cursor.ahead(10, 4) == []


def test_slots_find_the_extents_of_each_part_once() -> None:
    numbers = np.concatenate([np.arange(start, start + 7) for start in np.random.default_rng(2).permutation(40) * 9])
    slots = iovec.Slots(numbers)
    assert len(slots) == 280
    for first in range(0, 280, 3):
        for count in (1, 8, 280 - first):
            assert np.array_equal(slots.part(first, count), numbers[first : first + count])
            found = slots.extents(first, count)
            assert np.array_equal(found, iovec.find_extents(numbers[first : first + count]))
            assert slots.extents(first, count) is found
    assert len(slots._found) <= slots.MOST
