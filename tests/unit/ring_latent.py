"""The warps of the kernel for bfloat16 rows: ``latent_decode.cu``, ``gather.cuh``, ``attend.cuh``, ``turns.cuh``.

A stage of the ring is a tile of 64 tokens, which all four warps of the producer fill. Two warpgroups of consumers
compute scores and values. In mode tokens they take alternate tiles; in modes rows and width each takes every tile.
"""

from __future__ import annotations

from ring_common import CONSUMERS, WARPS, MergingBlock, Work
from ring_machine import Copies, Memory, Place, Steps


class LatentBlock(MergingBlock):
    """``latent_decode()``.

    Args:
        stages: STAGES, each one tile. mode: tokens, rows or width.
    """

    def __init__(self, seed: int, work: Work, stages: int, mode: str) -> None:
        super().__init__(seed, work)
        self.stages, self.mode = stages, mode
        self.chunk_tiles = 4 if mode == "rows" else 8  # kChunkTiles
        self.full = self.barriers("full", stages, 4)
        self.empty = self.barriers("empty", stages, 4 if mode == "tokens" else 8)
        self.q_full, self.q_empty = self.barrier("q_full", 4), self.barrier("q_empty", 8)
        self.producers = self.named_barrier("sync_producers", 4)
        self.turns = [self.named_barrier(f"the turn of group {group}", 8) for group in range(2)]
        self.ring = Memory("ring")  # (stage, producer warp): (segment, tile)
        self.slots = Memory("slots")  # (chunk % 2, producer warp): (segment, first tile)
        # Each cell is an eighth of the query's memory: it holds the segment, or sums that join() exchanges.
        for warp in WARPS:
            self.start(f"producer warp {warp}", self.produce(warp, self.copies(f"producer warp {warp}")))
            for group in range(2):
                self.start(f"consumer warp {group}.{warp}", self.consume(group, warp))

    # gather.cuh

    def produce(self, warp: int, copies: Copies) -> Steps:
        """``produce()``, with ``load_query()`` and ``load_tile()``."""
        at, chunk, q_round, first_segment = Place(self.stages), 0, 0, True
        for segment, end in enumerate(self.work.tiles):
            if end == 0:
                continue
            if not first_segment:
                yield from self.q_empty.wait(q_round)
                q_round += 1
                for eighth in (warp, warp + 4):
                    yield from copies.copy(self.query, eighth, segment)
                yield from copies.arrive(self.q_full)
            first_segment = False
            for first in range(0, end, self.chunk_tiles):
                yield from self.slots.write((chunk, warp), (segment, first))
                yield from self.producers.sync(warp)
                for tile in range(first, min(first + self.chunk_tiles, end)):
                    yield from self.empty[at.slot].wait(at.round - 1)
                    yield from self.slots.read([(chunk, w) for w in WARPS], (segment, first))
                    yield from copies.copy(self.ring, (at.slot, warp), (segment, tile))
                    yield from copies.arrive(self.full[at.slot])
                    at.advance()
                chunk ^= 1

    # attend.cuh

    def read_stage(self, slot: int, segment: int, tile: int) -> Steps:
        """Compute scores or values of a tile, from the start of wgmma to the end of the wait for it."""
        yield from self.ring.read([(slot, warp) for warp in WARPS], (segment, tile))

    def attend(self, group: int, segment: int, base: int) -> Steps:
        """``attend()``: modes tokens and width."""
        tokens = self.mode == "tokens"
        for tile in range(group if tokens else 0, self.work.tiles[segment], 2 if tokens else 1):
            at = Place(self.stages, base + tile)
            yield from self.full[at.slot].wait(at.round)
            yield from self.query.read(CONSUMERS, segment)
            yield from self.read_stage(at.slot, segment, tile)
            yield from self.read_stage(at.slot, segment, tile)
            yield from self.empty[at.slot].arrive()

    def join(self, group: int, warp: int, segment: int) -> Steps:
        """``join()``, which exchanges sums in the query's memory."""
        ours, theirs = group * 4 + warp, (1 - group) * 4 + warp
        yield from self.consumers.sync(ours)
        for turn in range(2):
            if turn == 1:
                yield from self.consumers.sync(ours)
            yield from self.query.write(ours, ("sums", segment, turn))
            yield from self.consumers.sync(ours)
            yield from self.query.read([theirs], ("sums", segment, turn))

    # turns.cuh

    def take_turn(self, group: int, warp: int) -> Steps:
        yield from self.turns[group].sync((group, warp))

    def pass_turn(self, group: int, warp: int) -> Steps:
        yield from self.turns[1 - group].arrive((group, warp))

    def attend_in_turns(self, group: int, warp: int, segment: int, base: int) -> Steps:
        """``attend_in_turns()``: mode rows."""
        at, tiles = Place(self.stages, base), self.work.tiles[segment]
        if group == 1:
            yield from self.pass_turn(group, warp)
        yield from self.full[at.slot].wait(at.round)
        yield from self.take_turn(group, warp)
        yield from self.query.read(CONSUMERS, segment)
        if group == 0 or tiles > 1:
            yield from self.pass_turn(group, warp)
        yield from self.read_stage(at.slot, segment, 0)
        for tile in range(1, tiles):
            current = at.slot
            at.advance()
            yield from self.take_turn(group, warp)
            self.ring.expect([(current, w) for w in WARPS], (segment, tile - 1))  # values are queued
            yield from self.full[at.slot].wait(at.round)
            yield from self.query.read(CONSUMERS, segment)  # scores are queued
            if group == 0 or tile + 1 < tiles:
                yield from self.pass_turn(group, warp)
            yield from self.read_stage(current, segment, tile - 1)
            yield from self.empty[current].arrive()
            yield from self.read_stage(at.slot, segment, tile)
        yield from self.read_stage(at.slot, segment, tiles - 1)
        yield from self.empty[at.slot].arrive()

    # latent_decode.cu

    def consume(self, group: int, warp: int) -> Steps:
        """``consume()``."""
        consumer, base, q_round = group * 4 + warp, 0, 0
        for segment, tiles in enumerate(self.work.tiles):
            if tiles == 0:
                continue
            if base == 0:
                yield from self.query.write(consumer, segment)
                yield from self.consumers.sync(consumer)
            else:
                yield from self.q_full.wait(q_round)
                q_round += 1
            if self.mode == "rows":
                yield from self.attend_in_turns(group, warp, segment, base)
            else:
                yield from self.attend(group, segment, base)
            base += tiles
            if self.mode == "tokens":
                yield from self.join(group, warp, segment)
            yield from self.q_empty.arrive()
            if not self.work.whole[segment]:
                yield from self.consumers.sync(consumer)
                yield from self.hand_over(segment, consumer)
        yield from self.merge(consumer)
