"""The proof of coverage is compared with a list of cells, for shares and cuts of any kind."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer.chunks import cut, share_of
from sglang_tpla.transfer.decode.coverage import Coverage

HALVES = {Part.COMMON: "c", Part.OWN: "o", Part.FULL: "co"}


@given(layers=st.integers(1, 80), count=st.integers(1, 100))
def test_shares_are_disjoint_whole_and_even(layers: int, count: int) -> None:
    shares = [share_of(layers, index, count) for index in range(count)]
    assert [layer for share in shares for layer in share] == list(range(layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(data=st.data())
def test_chunks_are_whole_where_every_cell_came_once(data: st.DataObject) -> None:
    """For random rectangles, the proof agrees with a list of all their cells."""
    layers, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    own = [data.draw(st.integers(0, 2)) for _ in range(layers)]
    announced = data.draw(st.integers(1, tokens))
    coverage = Coverage(layers, tokens, lambda layer, part: own[layer] if part is Part.OWN else 3)
    cells: Counter[tuple[int, int, str]] = Counter()
    for _ in range(data.draw(st.integers(0, 8))):
        first, start = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, tokens - 1))
        stop, end = data.draw(st.integers(first + 1, layers)), data.draw(st.integers(start + 1, tokens))
        part = data.draw(st.sampled_from(Part))
        mine = {
            (layer, token, half)
            for layer in range(first, stop)
            for token in range(start, end)
            for half in HALVES[part]
            if half == "c" or own[layer]
        }
        wrong = coverage.claim(range(first, stop), start, end - start, part)
        assert bool(wrong) == any(cells[cell] for cell in mine)
        if not wrong:
            cells.update(mine)
    due = {
        (layer, token, half)
        for layer in range(layers)
        for token in range(announced)
        for half in "co"
        if half == "c" or own[layer]
    }
    assert (coverage.missing(announced) == "") == (set(cells) == due)


@given(data=st.data())
def test_ranks_that_cut_and_step_differently_send_a_request_once(data: st.DataObject) -> None:
    layers, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    widths = [(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))) for _ in range(layers)]
    coverage = Coverage(layers, tokens, lambda layer, part: widths[layer][part is Part.OWN])
    count = data.draw(st.integers(1, 4))
    for index in range(count):
        share = share_of(layers, index, count)
        parts = data.draw(st.sampled_from([(Part.FULL,), (Part.COMMON, Part.OWN)]))
        steps = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=3))})
        for part in parts:
            columns = [widths[i] for i in share]
            items = [{Part.FULL: c + o, Part.COMMON: c, Part.OWN: o}[part] for c, o in columns]
            limit = data.draw(st.integers(max(items, default=1) or 1, 60))
            for start, stop in itertools.pairwise(steps):
                for chunk in cut(share.start, items, start, stop - start, 1, limit):
                    rows = range(chunk.first_layer, chunk.first_layer + chunk.layers)
                    assert coverage.claim(rows, chunk.first_token, chunk.tokens, part) == ""
    assert coverage.missing(tokens) == ""
