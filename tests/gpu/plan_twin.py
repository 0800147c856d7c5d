"""The kernel ``latent_plan`` in Python: a decode step's cache cut into equal parts, one for each persistent block.

All requests' tiles (64 tokens) form one sequence. A part is a range of that sequence and costs its tiles plus
``SEGMENT_COST`` for every request that it touches (loading the query, joining and storing the result). Parts that do
not cross requests leave fewer partial results, so they are preferred if they are nearly as equal. Otherwise a greedy
walk lays parts of the smallest capacity with which all requests fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tpla.attention.hopper.plan import MAX_PARTS, SEGMENT_COST, TILE_TOKENS


@dataclass(frozen=True)
class Plan:
    """The parts of a step.

    Args:
        part_begin: parts + 1 rows (request, tile, segments of that request in earlier parts); a part ends where the
            next begins.
        split_start: batch + 1 numbers; request b's partial results are split_start[b] up to split_start[b + 1]. The
            block of a request's only split writes the output itself; an empty request has no split.
    """

    part_begin: tuple[tuple[int, int, int], ...]
    split_start: tuple[int, ...]


def tiles_of(length: int) -> int:
    """Return the number of tiles that hold ``length`` tokens."""
    return -(-length // TILE_TOKENS)


def _lay_parts(tiles: Sequence[int], parts: int, capacity: int) -> Plan | None:
    part_begin, split_start = [], []
    request = tile = before = splits = 0
    for _ in range(parts):
        part_begin.append((request, tile, before))
        left = capacity
        while request < len(tiles):
            rest = tiles[request] - tile
            if tiles[request] == 0 or rest + SEGMENT_COST <= left:
                split_start.append(splits)
                if tiles[request]:
                    splits += before + 1
                    left -= rest + SEGMENT_COST
                request, tile, before = request + 1, 0, 0
            else:
                take = left - SEGMENT_COST
                if take > 0:
                    tile, before = tile + take, before + 1
                break
    if request < len(tiles):
        return None
    return Plan((*part_begin, (request, tile, before)), (*split_start, splits))


def _lay_whole(tiles: Sequence[int], parts: int, most: int) -> Plan | None:
    counts = [-(-n // most) for n in tiles]
    if sum(counts) > parts:
        return None
    split_start = [0]
    part_begin = []
    for request, (n, count) in enumerate(zip(tiles, counts, strict=True)):
        part_begin += [(request, n * i // count, i) for i in range(count)]
        split_start.append(split_start[-1] + count)
    part_begin += [(len(tiles), 0, 0)] * (parts + 1 - len(part_begin))
    part_begin[0] = (0, 0, 0)  # so that the first part also walks over leading empty requests
    return Plan(tuple(part_begin), tuple(split_start))


def plan_parts(lengths: Sequence[int], parts: int) -> Plan:
    """Cut requests of ``lengths`` tokens into ``parts`` parts whose costs are as equal as whole tiles allow.

    Raises:
        ValueError: ``parts`` is below 1 or above ``MAX_PARTS``.
    """
    if not 1 <= parts <= MAX_PARTS:
        raise ValueError(f"parts must be 1 to {MAX_PARTS}; got {parts}")
    tiles = [tiles_of(length) for length in lengths]
    capacity = -(-sum(n + SEGMENT_COST for n in tiles if n) // parts)
    for most in range(max(capacity - SEGMENT_COST, 1), capacity + SEGMENT_COST + 1):
        plan = _lay_whole(tiles, parts, most)
        if plan is not None:
            return plan
    while True:
        plan = _lay_parts(tiles, parts, capacity)
        if plan is not None:
            return plan
        capacity += 1
