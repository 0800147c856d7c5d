"""The parts of a cache row that a chunk of a transfer may carry.

A plain row is ``[own or shared latent columns | rope]`` (the other formats: `row_format`). The sender picks the part
that a rank gets:

    FULL    [w_l + rope]   the whole row
    COMMON  [r_l + rope]   the columns that every group has, and the rope
    OWN     [w_l - r_l]    the columns of one group
"""

from __future__ import annotations

import enum


class Part(enum.IntEnum):
    """Which columns of a row a chunk carries."""

    FULL = 0
    COMMON = 1
    OWN = 2


def part_columns(width: int, shared: int, rope_dim: int, part: Part) -> tuple[tuple[int, int], ...]:
    """Column ranges of the row that a part fills, in payload order; empty ranges left out."""
    ranges = {
        Part.FULL: ((0, width + rope_dim),),
        Part.COMMON: ((0, shared), (width, width + rope_dim)),
        Part.OWN: ((shared, width),),
    }[part]
    return tuple((start, stop) for start, stop in ranges if stop > start)
