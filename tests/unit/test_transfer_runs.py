"""Rows as runs of neighbours: all of them, in order, and the arithmetic on pieces of memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tpla.transfer import runs
from sglang_tpla.transfer.splicing import advance

SLOTS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=8).map(
    lambda pairs: np.concatenate([np.arange(first, first + count) for first, count in pairs])
)


@settings(deadline=None)
@given(slots=SLOTS, most=st.one_of(st.none(), st.integers(1, 5)))
def test_runs_are_the_slots_in_order(slots: np.ndarray, most: int | None) -> None:
    found = runs.find_runs(slots, most)
    flat = [(slot + step, row + step) for slot, row, count in found for step in range(count)]
    assert flat == [(int(slot), row) for row, slot in enumerate(slots)]
    assert most is None or all(count <= most for _, _, count in found)


def test_nothing_has_no_runs() -> None:
    assert runs.find_runs(np.empty(0, dtype=np.int64)) == []


@settings(deadline=None)
@given(slots=SLOTS, row_bytes=st.integers(1, 200_000))
def test_blocks_cover_every_row_once(slots: np.ndarray, row_bytes: int) -> None:
    blocks = runs.cut_blocks(slots, row_bytes)
    rows = [row for block in blocks for row in range(block.rows.start, block.rows.stop)]
    assert rows == list(range(slots.size))
    step = max(1, runs.BLOCK_BYTES // row_bytes)
    for block in blocks:
        assert block.rows.stop - block.rows.start <= step
        if block.runs:
            covered = [row + step for _, row, count in block.runs for step in range(count)]
            assert covered == list(range(block.rows.start, block.rows.stop))


@settings(deadline=None)
@given(slots=SLOTS, data=st.data())
def test_pieces_of_a_pool_are_its_rows(slots: np.ndarray, data: st.DataObject) -> None:
    layers = [np.random.default_rng(seed).integers(0, 256, (60, 6), dtype=np.uint8) for seed in range(2)]
    want = b"".join(layer[slots].tobytes() for layer in layers)
    pieces = runs.pool_pieces(layers, runs.find_runs(slots))
    assert b"".join(pieces.views) == want
    assert pieces.size_bytes == len(want)
    assert [view.nbytes for view in pieces.views] == pieces.table[:, 1].tolist()
    cursor, read, table = runs.Cursor(pieces.views), b"", pieces.table
    while read != want:
        ahead = b"".join(cursor.ahead(data.draw(st.integers(1, 100)), data.draw(st.integers(1, 4))))
        assert ahead and want[len(read) :].startswith(ahead)
        taken = data.draw(st.integers(1, len(ahead)))
        read += ahead[:taken]
        cursor.advance(taken)
        table = advance(table, taken)
        assert int(table[:, 1].sum()) == len(want) - len(read)
    assert cursor.ahead(10) == [] and not table.size


def test_what_is_left_of_a_table_begins_where_it_was_cut() -> None:
    table = np.array([[1000, 10], [5000, 20]], dtype=np.uint64)
    assert advance(table.copy(), 10).tolist() == [[5000, 20]]
    assert advance(table.copy(), 13).tolist() == [[5003, 17]]
    assert advance(table.copy(), 4).tolist() == [[1004, 6], [5000, 20]]
