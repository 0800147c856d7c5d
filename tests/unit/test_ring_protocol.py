"""The rings of the Hopper kernels work, whichever warp is late: models of the barriers run many seeded schedules.

``TEST_RING_SCHEDULES=2000`` runs 2,000 schedules of each ring.
"""

import os
import random
from collections.abc import Callable

import pytest
from ring_common import Work
from ring_latent import LatentBlock
from ring_machine import Barrier, Block, Copies, Place, RingError, Steps
from ring_sketched import SketchedBlock
from ring_tiles import TilesBlock

from sglang_tpla.attention.hopper.decode import Variant, variant_for
from sglang_tpla.attention.hopper.sketched import MAX_STAGES, MIN_STAGES
from sglang_tpla.attention.interface import DecodeShape

SCHEDULES = int(os.environ.get("TEST_RING_SCHEDULES", "20"))  # schedules of each ring
ENOUGH = 200  # schedules in which an error should show; most errors show within ten
Make = Callable[[int], Block]  # makes a block from a seed


def random_work(seed: int, ring_tiles: float) -> Work:
    """Return segments of up to 12 tiles that go around the ring at least three times; some warps vote for retries."""
    draw = random.Random(seed)
    tiles: list[int] = []
    while sum(tiles) < 3 * ring_tiles:
        tiles.append(draw.choice((0, 1, 2, draw.randint(1, 12), draw.randint(1, 12))))
    chance = draw.choice((0, 0.02, 0.2))  # the chance of a vote
    over = [
        (segment, tile, attempt, warp)
        for segment, count in enumerate(tiles)
        for tile in range(count)
        for attempt in range(2)
        for warp in range(4)
        if draw.random() < chance
    ]
    return Work(tiles, [draw.random() < 0.5 for _ in tiles], frozenset(over))


def run_schedules(make: Make, schedules: int = SCHEDULES) -> None:
    for seed in range(schedules):
        try:
            make(seed).run()
        except RingError as error:
            raise RingError(f"schedule {seed}: {error}") from None


def sketched(stages: int, row_values: bool, form: type[SketchedBlock] = SketchedBlock, trusting: bool = False) -> Make:
    return lambda seed: form(seed, random_work(seed, stages / 2), stages, row_values, trusting)


def latent(stages: int, mode: str) -> Make:
    return lambda seed: LatentBlock(seed, random_work(seed, stages), stages, mode)


def tiles(seed: int) -> Block:
    return TilesBlock(seed, random_work(seed, 2))


@pytest.mark.parametrize("row_values", [False, True])
@pytest.mark.parametrize("stages", range(MIN_STAGES, MAX_STAGES + 1))
def test_sketched_rows(stages: int, row_values: bool) -> None:
    run_schedules(sketched(stages, row_values))


def served_rings() -> list[tuple[int, str]]:
    """Return the stages and modes of the kernel for bfloat16 rows at all widths."""
    variants = [variant_for(DecodeShape(width, heads)) for width in range(64, 513, 32) for heads in (8, 64, 128)]
    return sorted({(variant.stages, variant.mode) for variant in variants if isinstance(variant, Variant)})


@pytest.mark.parametrize(("stages", "mode"), served_rings())
def test_bfloat16_rows(stages: int, mode: str) -> None:
    run_schedules(latent(stages, mode))


def test_tiles() -> None:
    run_schedules(tiles)


# The models must find the errors below. A trusting model continues after a wrong wait, and shows the consequences.


class OwnRoomAlone(SketchedBlock):
    """The producer's first rule: a warp waits only for room for its half tiles, and does not meet the others."""

    def sync_producers(self, warp: int) -> Steps:
        yield from ()


class RoomOfOthersToo(SketchedBlock):
    """The second rule, for an odd number of stages: a warp waits for room for both halves of each tile, in order."""

    def produce(self, warp: int, copies: Copies) -> Steps:
        at = Place(self.stages)
        for segment, count in enumerate(self.work.tiles):
            for tile in range(count):
                for half in range(2):
                    yield from self.empty[at.slot].wait(at.round - 1)
                    if half == warp // 2:
                        yield from copies.copy(self.ring, (at.slot, warp % 2), (segment, tile, half))
                        yield from copies.arrive(self.full[at.slot])
                    at.advance()


def test_a_producer_must_not_be_a_round_ahead() -> None:
    """Five stages, with values by query rows, need the rule.

    With seven or more, or with turned values, a freed stage implies enough about the stages before it.
    """
    with pytest.raises(RingError, match=r"producer warp .: a wait for phase . of empty.* returns"):
        run_schedules(sketched(5, True, OwnRoomAlone), ENOUGH)
    with pytest.raises(RingError, match=r"a reader of .* sees|no warp can move"):
        run_schedules(sketched(5, True, OwnRoomAlone, trusting=True), ENOUGH)


@pytest.mark.parametrize("row_values", [False, True])
@pytest.mark.parametrize("stages", [5, 7, 9, 11])
def test_a_producer_must_not_wait_for_room_that_others_fill(stages: int, row_values: bool) -> None:
    with pytest.raises(RingError, match=r"producer warp .: a wait for phase .* of empty.* comes late"):
        run_schedules(sketched(stages, row_values, RoomOfOthersToo), ENOUGH)
    with pytest.raises(RingError, match=r"no warp can move: producer warp"):
        run_schedules(sketched(stages, row_values, RoomOfOthersToo, trusting=True), ENOUGH)


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("row_values", [False, True])
def test_three_stages_are_too_few_for_half_tiles(row_values: bool, trusting: bool) -> None:
    """Values by query rows take one stage for another. Turned values never reach their first tile."""
    found = "no warp can move" if not row_values else "a reader of .* sees" if trusting else "a wait for .* returns"
    with pytest.raises(RingError, match=found):
        run_schedules(sketched(3, row_values, trusting=trusting), ENOUGH)


@pytest.mark.parametrize("mode", ["tokens", "rows"])
def test_one_stage_is_too_few_for_tiles(mode: str) -> None:
    with pytest.raises(RingError, match=r"returns|no warp can move"):
        run_schedules(latent(1, mode), ENOUGH)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((sketched(6, True), name) for name in ("full", "empty", "used")),
        *((sketched(6, False), name) for name in ("full", "empty", "used")),
        *((latent(4, mode), name) for mode in ("tokens", "rows") for name in ("full", "empty", "q_full", "q_empty")),
        *((latent(3, "width"), name) for name in ("full", "empty", "q_full", "q_empty")),
        *((tiles, name) for name in ("keys_full", "keys_empty", "values_full", "values_empty", "ready", "used")),
    ],
)
def test_every_arrival_counts(make: Make, name: str) -> None:
    """The models notice if a barrier expects one warp too few."""

    def short(seed: int) -> Block:
        block = make(seed)
        barriers = getattr(block, name)
        for barrier in [barriers] if isinstance(barriers, Barrier) else barriers:
            barrier.arrivals -= 1
            barrier.pending -= 1
            barrier.trusting = True
        return block

    with pytest.raises(RingError):
        run_schedules(short, ENOUGH)
