"""The model's code for all three kernels: a block's part of the plan (``parts.cuh``) and of a merge (``merge.cuh``)."""

from collections.abc import Sequence
from dataclasses import dataclass

from ring_machine import Block, Memory, Steps

WARPS = range(4)  # the warps of a warpgroup
CONSUMERS = range(8)  # warps that merge


@dataclass(frozen=True)
class Work:
    """A block's part of the plan.

    Args:
        tiles: the tiles of each segment; an empty request has none. whole: whether a segment is its whole request.
        over: each (segment, tile, attempt, warp) with a score so far above all earlier ones that it needs another try.
    """

    tiles: Sequence[int]
    whole: Sequence[bool]
    over: frozenset[tuple[int, int, int, int]] = frozenset()


class MergingBlock(Block):
    """A block with the memory that the merge uses.

    Args:
        work: the block's part of the plan. trusting: see `Barrier`.
    """

    def __init__(self, seed: int, work: Work, trusting: bool = False) -> None:
        super().__init__(seed, trusting)
        self.work = work
        self.consumers = self.named_barrier("sync_consumers", 8)
        self.query = Memory("query")
        self.shared = Memory("merge")  # holds the last segment that is only a part of its request

    def hand_over(self, segment: int, consumer: int) -> Steps:
        """``hand_over()`` with ``announce()``, which one thread calls after a barrier of all that stored."""
        if consumer == 0:
            yield from self.shared.write("segment", segment)

    def merge(self, consumer: int) -> Steps:
        """``merge()``, whose sums use the query's memory, and the barrier before it."""
        parts = [segment for segment, whole in enumerate(self.work.whole) if not whole and self.work.tiles[segment]]
        yield from self.consumers.sync(consumer)
        yield from self.shared.read(["segment"], parts[-1] if parts else None)
        yield from self.query.write(consumer, "sums of the merge")
