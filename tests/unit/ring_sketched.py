"""The warps of the kernel for sketched rows: ``sketched_decode.cu`` and the other ``sketched_*``.

A stage of the ring is half a tile, of 32 tokens. Warps 0 and 1 of the producer fill the first halves, warps 2 and 3
the second halves, 16 tokens each. Two warpgroups of scores take alternate tiles, and each of their warps reads the rows
that one producer warp has copied. A warpgroup of values takes all tiles: with turned values it reads the raw rows and
frees them; with ROW_VALUES it reads the rows that the scores have unpacked, and the scores free the raw rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ring_common import CONSUMERS, WARPS, MergingBlock, Work
from ring_machine import Answer, Copies, Memory, Place, RingError, Steps

EARLY = 1  # kEarly: half tiles that a warp copies before the query has arrived
PARTS = [(group, warp) for group in range(3) for warp in WARPS]  # of what sums begin with, in the probabilities' memory


@dataclass
class Counts:
    """The counts of a warp of scores over all segments: its tries at tiles, and its tiles."""

    tries: int = 0
    done: int = 0


class SketchedBlock(MergingBlock):
    """``sketched_decode()``.

    Args:
        stages: STAGES, each half a tile. row_values: ROW_VALUES. trusting: see `Barrier`.
    """

    def __init__(self, seed: int, work: Work, stages: int, row_values: bool, trusting: bool = False) -> None:
        super().__init__(seed, work, trusting)
        self.stages, self.row_values = stages, row_values
        self.full = self.barriers("full", stages, 2)  # kFullArrivals, in warps
        self.empty = self.barriers("empty", stages, 2 if row_values else 4)
        self.query_came = self.barrier("query", 12)
        self.ready = self.barriers("ready", 2, 1)
        self.used = self.barriers("used", 2, 4)
        self.producers = self.named_barrier("sync_producers", 4)
        self.all = self.named_barrier("sync_all", 12)
        self.groups = [self.named_barrier(f"sync_group {group}", 4) for group in range(3)]
        self.ring = Memory("ring")  # (stage, producer warp of the half): (segment, tile, half)
        self.probability = Memory("probability")  # (group, warp): (segment, tile, reference)
        self.values = Memory("values")  # (group, warp), with ROW_VALUES: (segment, tile)
        self.stamp, self.published = [0, 0], Memory("published")  # group: the reference of the tile that is ready
        self.votes = Memory("votes")  # (group, turn, warp)
        self.exchange = Memory("exchange")  # (group, warp)
        self.starts, self.largest = Memory("start"), Memory("largest")
        self.applied = Memory("applied")  # warp, without ROW_VALUES: the reference of the values
        for warp in WARPS:
            self.start(f"producer warp {warp}", self.produce(warp, self.copies(f"producer warp {warp}")))
            self.start(f"warp {warp} of scores 0", self.consume_scores(0, warp))
            self.start(f"warp {warp} of scores 1", self.consume_scores(1, warp))
            self.start(f"warp {warp} of values", self.consume_values(warp))

    # sketched_gather.cuh

    def produce(self, warp: int, copies: Copies) -> Steps:
        """``produce()`` and ``load_rows()``."""
        half = warp // 2
        at, filled = Place(self.stages, half), 0
        for segment, tiles in enumerate(self.work.tiles):
            for tile in range(tiles):
                if tile % 2 == 0:
                    yield from self.sync_producers(warp)
                yield from self.empty[at.slot].wait(at.round - 1)
                if filled == EARLY:
                    yield from self.query_came.wait(0)
                filled += 1
                yield from copies.copy(self.ring, (at.slot, warp % 2), (segment, tile, half))
                yield from copies.arrive(self.full[at.slot])
                at.advance(2)

    def sync_producers(self, warp: int) -> Steps:
        """``sync_producers()``, for an odd number of stages: a stage then alternates between the pairs of warps."""
        if self.stages % 2:
            yield from self.producers.sync(warp)

    def load_query(self, segment: int, first: bool, consumer: int) -> Steps:
        """``load_query()``; ``consumer`` counts warps. What sums begin with goes to the probabilities' memory."""
        if first:
            yield from self.query_came.arrive()
        yield from self.largest.write(consumer, segment)
        yield from self.all.sync(consumer)
        yield from self.largest.read(range(12), segment)
        yield from self.query.write(consumer, (segment, "in order"))
        yield from self.probability.write(PARTS[consumer], ("parts", segment))
        yield from self.all.sync(consumer)

    # sketched_scores.cuh

    def sync_any(self, group: int, warp: int, turn: int, over: bool) -> Answer:
        """``sync_any()``, which returns whether one of the warps votes for a second try."""
        yield from self.votes.write((group, turn, warp), over)
        yield from self.groups[group].sync(warp)
        votes = [self.votes.cells.get((group, turn, voter)) for voter in WARPS]
        yield None
        return True in votes

    def find_starts(self, group: int, warp: int, segment: int) -> Steps:
        """``find_starts()``; each warp computes a part."""
        yield from self.probability.read(PARTS, ("parts", segment))
        yield from self.starts.write(4 * group + warp, segment)
        yield from self.consumers.sync(4 * group + warp)

    def offer_and_settle(self, group: int, warp: int, start: bool, offered: object) -> Steps:
        """``offer()`` and ``settle()``: a warpgroup, or both at a segment's start, agree on a reference."""
        yield from self.exchange.write((group, warp), offered)
        yield from self.consumers.sync(4 * group + warp) if start else self.groups[group].sync(warp)
        yield from self.exchange.read([(g, w) for g in ((0, 1) if start else (group,)) for w in WARPS], offered)
        if start:
            yield from self.consumers.sync(4 * group + warp)

    def attend(self, group: int, warp: int, segment: int, base: int, counts: Counts) -> Steps:
        """``attend()``, with ``scores()`` and ``soften()``."""
        tiles, half, mine = self.work.tiles[segment], warp // 2, (group, warp)
        ready, used = self.ready[group], self.used[group]
        if group >= tiles:
            yield from self.offer_and_settle(group, warp, True, ("start", segment))
        at = Place(self.stages, 2 * (base + group) + half)
        for tile in range(group, tiles, 2):
            fresh = tile == group
            raw = [(at.slot, warp % 2)], (segment, tile, half)
            yield from self.full[at.slot].wait(at.round)
            yield from self.ring.read(*raw)
            yield from self.query.read(range(12), (segment, "in order"))
            yield from self.starts.read(CONSUMERS, segment)
            if self.row_values:
                yield from used.wait(counts.done - 1)
                yield from self.values.write(mine, (segment, tile))
            self.ring.expect(*raw)
            if self.row_values:
                yield from self.empty[at.slot].arrive()
            for attempt in range(2):
                if fresh:
                    start = tile == group
                    reference = ("start", segment) if start else (segment, tile)
                    yield from self.offer_and_settle(group, warp, start, reference)
                if not self.row_values:
                    yield from used.wait(counts.done - 1)
                counts.tries += 1
                yield from self.probability.write(mine, (segment, tile, reference))
                if fresh and warp == 0:
                    yield from self.published.write(group, reference)
                    self.stamp[group] = 0 if tile == group else 2 * counts.tries + group
                over = (segment, tile, attempt, warp) in self.work.over
                again = yield from self.sync_any(group, warp, counts.tries & 1, over)
                if again != any((segment, tile, attempt, voter) in self.work.over for voter in WARPS):
                    raise RingError(f"votes on tile {tile} of segment {segment} were read as {again}")
                if not again or fresh:
                    break
                fresh = True
            if warp == 0:
                yield from ready.arrive()
            counts.done += 1
            at.advance(4)
        yield from self.groups[group].sync(warp)
        yield from self.exchange.write(mine, ("sum", segment))

    # sketched_row_values.cuh, sketched_turned_values.cuh, sketched_results.cuh

    def gather_values(self, warp: int, segment: int, base: int, done: list[int]) -> Steps:
        """``gather_values()`` of both forms, with ``wait_for_tile()`` and ``add_values()``."""
        stamp, reference = None, None
        if not self.row_values:
            yield from self.applied.write(warp, None)
        for tile in range(self.work.tiles[segment]):
            group = tile & 1
            yield from self.ready[group].wait(done[group])
            done[group] += 1
            if self.stamp[group] != stamp:
                stamp = self.stamp[group]
                if not self.row_values:
                    yield from self.groups[2].sync(warp)
                    yield from self.applied.read(WARPS, reference)
                reference = self.published.cells.get(group)
                yield from self.published.read([group], reference)
                if not self.row_values:
                    yield from self.groups[2].sync(warp)
                    yield from self.applied.write(warp, reference)
                    self.published.expect([group], reference)
            weights = [(group, w) for w in WARPS], (segment, tile, reference)
            yield from self.probability.read(*weights)
            if self.row_values:
                yield from self.values.read([(group, w) for w in WARPS], (segment, tile))
            else:
                for half in range(2):
                    stage = Place(self.stages, 2 * (base + tile) + half).slot
                    yield from self.ring.read([(stage, 0), (stage, 1)], (segment, tile, half))
                    yield from self.empty[stage].arrive()
            self.probability.expect(*weights)
            yield from self.used[group].arrive()

    def store(self, warp: int, segment: int) -> Steps:
        """``store()`` of both forms; the memory for warp 0's `largest_values()` is that of the published reference."""
        if not self.row_values:
            if warp == 0:
                yield from self.published.write(0, ("largest values", segment))
            yield from self.groups[2].sync(warp)
            yield from self.published.read([0], ("largest values", segment))
        yield from self.exchange.read([(group, w) for group in range(2) for w in WARPS], ("sum", segment))  # total_of()
        if not self.row_values:
            yield from self.applied.write(warp, ("scale", segment))
            yield from self.groups[2].sync(warp)
            yield from self.applied.read(WARPS, ("scale", segment))

    # sketched_decode.cu

    def consume_scores(self, group: int, warp: int) -> Steps:
        """``consume()`` for roles 0 and 1."""
        consumer, base, counts = 4 * group + warp, 0, Counts()
        for segment, tiles in enumerate(self.work.tiles):
            if tiles == 0:
                continue
            yield from self.load_query(segment, base == 0, consumer)
            yield from self.find_starts(group, warp, segment)
            yield from self.attend(group, warp, segment, base, counts)
            base += tiles
            yield from self.all.sync(consumer)
            if not self.work.whole[segment]:
                yield from self.all.sync(consumer)
                yield from self.hand_over(segment, consumer)
        yield from self.merge(consumer)

    def consume_values(self, warp: int) -> Steps:
        """``consume()`` for role 2."""
        consumer, base, done = 8 + warp, 0, [0, 0]
        for segment, tiles in enumerate(self.work.tiles):
            if tiles == 0:
                continue
            yield from self.load_query(segment, base == 0, consumer)
            yield from self.gather_values(warp, segment, base, done)
            base += tiles
            yield from self.all.sync(consumer)
            yield from self.store(warp, segment)
            if not self.work.whole[segment]:
                yield from self.all.sync(consumer)
