"""The plan has every tile in exactly one part, in order, and its parts are as equal as they can be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_twin import Plan, plan_parts, tiles_of

from sglang_tpla.attention.hopper.plan import MAX_PARTS, SEGMENT_COST


def segments(plan: Plan, lengths: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """Return the walk of each part's block, (request, first tile, end tile, split number), as in the kernel."""
    parts = []
    for (request, tile, before), (last, last_tile, _) in zip(plan.part_begin, plan.part_begin[1:], strict=False):
        walked = []
        while request < last or (request == last and tile < last_tile):
            end = last_tile if request == last else tiles_of(lengths[request])
            walked.append((request, tile, end, plan.split_start[request] + before))
            request, tile, before = request + 1, 0, 0
        parts.append(walked)
    return parts


lengths_strategy = st.lists(st.one_of(st.just(0), st.integers(1, 200), st.integers(1, 20000)), min_size=1, max_size=60)


@settings(max_examples=300, deadline=None)
@given(lengths_strategy, st.integers(1, 140))
def test_every_tile_once(lengths: list[int], parts: int) -> None:
    plan = plan_parts(lengths, parts)
    assert len(plan.part_begin) == parts + 1
    assert len(plan.split_start) == len(lengths) + 1
    walked = [segment for part in segments(plan, lengths) for segment in part]
    assert [segment[0] for segment in walked] == sorted(segment[0] for segment in walked)
    for request, length in enumerate(lengths):
        mine = [segment for segment in walked if segment[0] == request]
        assert mine, "an empty request must be walked over too: its output is set to zero there"
        covered = [tile for _, begin, end, _ in mine for tile in range(begin, end)]
        assert covered == list(range(tiles_of(length)))
        if length:
            splits = [segment[3] for segment in mine]
            assert splits == list(range(plan.split_start[request], plan.split_start[request + 1]))
        else:
            assert len(mine) == 1
            assert plan.split_start[request] == plan.split_start[request + 1]


@settings(max_examples=200, deadline=None)
@given(lengths_strategy, st.integers(1, 140))
def test_parts_are_balanced(lengths: list[int], parts: int) -> None:
    costs = [
        sum(end - begin + SEGMENT_COST for _, begin, end, _ in part if end > begin)
        for part in segments(plan_parts(lengths, parts), lengths)
    ]
    tiles = [tiles_of(length) for length in lengths if length]
    ideal = -(-sum(n + SEGMENT_COST for n in tiles) // parts)
    assert max(costs) <= ideal + 2 * SEGMENT_COST


@settings(max_examples=200, deadline=None)
@given(lengths_strategy, st.integers(1, 140))
def test_only_the_last_segment_of_a_part_goes_on(lengths: list[int], parts: int) -> None:
    """The kernel gives a block a share in one merge at most: that of the request in which its part ends."""
    plan = plan_parts(lengths, parts)
    for part in segments(plan, lengths):
        for request, _, end, _ in part[:-1]:
            assert end == tiles_of(lengths[request])


def test_known_plans() -> None:
    even = plan_parts([32768] * 16, 132)
    assert even.split_start == tuple(range(0, 129, 8))
    assert even.part_begin[:3] == ((0, 0, 0), (0, 64, 1), (0, 128, 2))
    assert plan_parts([4096] * 128, 132).split_start == tuple(range(129))
    assert plan_parts([131072], 132).split_start == (0, 128)
    assert plan_parts([0, 0], 4).split_start == (0, 0, 0)


@pytest.mark.parametrize("parts", [0, MAX_PARTS + 1])
def test_part_count_is_bounded(parts: int) -> None:
    with pytest.raises(ValueError, match="parts must be"):
        plan_parts([5], parts)
