"""The warps of the kernel that unpacks tiles of sketched rows: ``tiles_decode.cu`` and the other ``tiles_*``.

Each of eight warps copies raw rows to its part of memory, and unpacks eight rows of each tile to a ring of two tiles:
first the keys, then the values, with separate barriers. One warpgroup computes scores, and reads keys and values;
another computes values.
"""

from __future__ import annotations

from collections.abc import Sequence

from ring_common import CONSUMERS, WARPS, MergingBlock, Work
from ring_machine import Copies, Memory, Place, Steps

STAGES = 2  # kStages
FILL_WARPS = range(8)


class TilesBlock(MergingBlock):
    """``sketched_tiles()``."""

    def __init__(self, seed: int, work: Work) -> None:
        super().__init__(seed, work)
        self.keys_full, self.keys_empty = self.barriers("keys_full", STAGES, 8), self.barriers("keys_empty", STAGES, 4)
        self.values_full = self.barriers("values_full", STAGES, 8)
        self.values_empty = self.barriers("values_empty", STAGES, 8)
        self.ready, self.used = self.barrier("ready", 4), self.barrier("used", 4)
        self.raw = Memory("raw rows")  # (part, fill warp): (segment, tile)
        self.keys, self.values = Memory("keys"), Memory("values")  # (stage, fill warp): (segment, tile)
        self.eights = Memory("eights")  # (stage, fill warp)
        self.probability = Memory("probability")  # warp: (segment, tile)
        self.total = Memory("total")  # warp: segment
        self.largest = Memory("largest")
        self.published, self.stamp = Memory("published"), [0] * 4
        for warp in FILL_WARPS:
            self.start(f"fill warp {warp}", self.fill(warp, self.copies(f"fill warp {warp}")))
        for warp in WARPS:
            self.start(f"warp {warp} of scores", self.consume_scores(warp))
            self.start(f"warp {warp} of values", self.consume_values(warp))

    # tiles_fill.cuh

    def fill(self, warp: int, copies: Copies) -> Steps:
        """``fill()``: once a tile's keys are unpacked, the next tile's keys are copied, and the values likewise."""
        walk = iter([(segment, tile) for segment, tiles in enumerate(self.work.tiles) for tile in range(tiles)])
        at = Place(STAGES)
        current = next(walk, None)
        for part in ("keys", "values"):
            yield from copies.copy(self.raw, (part, warp), current)
            copies.commit()
        while current:
            yield from copies.wait_group(1)
            yield from self.raw.read([("keys", warp)], current)
            yield from self.keys_empty[at.slot].wait(at.round - 1)
            yield from self.keys.write((at.slot, warp), current)
            yield from self.keys_full[at.slot].arrive()
            following = next(walk, None)
            if following:
                yield from copies.copy(self.raw, ("keys", warp), following)
            copies.commit()
            yield from copies.wait_group(1)
            yield from self.raw.read([("values", warp)], current)
            yield from self.values_empty[at.slot].wait(at.round - 1)
            yield from self.eights.write((at.slot, warp), current)
            yield from self.values.write((at.slot, warp), current)
            yield from self.values_full[at.slot].arrive()
            if following:
                yield from copies.copy(self.raw, ("values", warp), following)
            copies.commit()
            at.advance()
            current = following

    # tiles_query.cuh

    def load_query(self, segment: int, consumer: int) -> Steps:
        """``load_query()``; ``consumer`` counts warps."""
        if consumer == 0:
            yield from self.largest.write("zero", segment)
        yield from self.consumers.sync(consumer)
        yield from self.query.write(consumer, (segment, "as it came"))
        yield from self.largest.read(["zero"], segment)  # atomicMax()
        yield from self.largest.write(consumer, segment)
        yield from self.consumers.sync(consumer)
        yield from self.largest.read(["zero", *CONSUMERS], segment)
        yield from self.query.write(consumer, (segment, "scaled"))
        yield from self.consumers.sync(consumer)

    # tiles_scores.cuh

    def attend(self, warp: int, segment: int, at: Place, done: int, fresh: Sequence[bool]) -> Steps:
        """``attend()``, with ``scores()`` and ``soften()``; ``fresh`` says which tiles set a new reference."""
        stamp = 0
        for tile in range(self.work.tiles[segment]):
            whole = [(at.slot, filler) for filler in FILL_WARPS], (segment, tile)
            yield from self.keys_full[at.slot].wait(at.round)
            yield from self.keys.read(*whole)
            yield from self.query.read(CONSUMERS, (segment, "scaled"))
            yield from self.values_full[at.slot].wait(at.round)
            yield from self.values.read(*whole)
            self.keys.expect(*whole)
            yield from self.keys_empty[at.slot].arrive()
            yield from self.eights.read(*whole)
            stamp += tile == 0 or fresh[tile]
            yield from self.used.wait(done - 1)
            done += 1
            yield from self.probability.write(warp, (segment, tile, stamp))
            if tile == 0 or fresh[tile]:
                yield from self.published.write(warp, (segment, stamp))
            self.stamp[warp] = stamp
            yield from self.ready.arrive()
            yield from self.values_empty[at.slot].arrive()
            at.advance()
        yield from self.total.write(warp, segment)

    # tiles_values.cuh

    def gather_values(self, warp: int, segment: int, at: Place, done: int) -> Steps:
        """``gather_values()``."""
        stamp = 0
        for tile in range(self.work.tiles[segment]):
            yield from self.values_full[at.slot].wait(at.round)
            yield from self.ready.wait(done)
            done += 1
            if self.stamp[warp] != stamp:
                stamp = self.stamp[warp]
                yield from self.published.read([warp], (segment, stamp))
            yield from self.probability.read([warp], (segment, tile, stamp))
            yield from self.values.read([(at.slot, filler) for filler in FILL_WARPS], (segment, tile))
            self.probability.expect([warp], (segment, tile, stamp))
            yield from self.used.arrive()
            yield from self.values_empty[at.slot].arrive()
            at.advance()

    # tiles_decode.cu

    def consume_scores(self, warp: int) -> Steps:
        """``consume<true>()``."""
        at, done = Place(STAGES), 0
        for segment, tiles in enumerate(self.work.tiles):
            if tiles == 0:
                continue
            fresh = [self.random.random() < 0.2 for _ in range(tiles)]  # each warp decides alone
            yield from self.load_query(segment, warp)
            yield from self.attend(warp, segment, at, done, fresh)
            done += tiles
            yield from self.consumers.sync(warp)
            if not self.work.whole[segment]:
                yield from self.consumers.sync(warp)
                yield from self.hand_over(segment, warp)
        yield from self.merge(warp)

    def consume_values(self, warp: int) -> Steps:
        """``consume<false>()``."""
        at, done, consumer = Place(STAGES), 0, 4 + warp
        for segment, tiles in enumerate(self.work.tiles):
            if tiles == 0:
                continue
            yield from self.load_query(segment, consumer)
            yield from self.gather_values(warp, segment, at, done)
            done += tiles
            yield from self.consumers.sync(consumer)
            yield from self.total.read([warp], segment)
            if not self.work.whole[segment]:
                yield from self.consumers.sync(consumer)
                yield from self.hand_over(segment, consumer)
        yield from self.merge(consumer)
