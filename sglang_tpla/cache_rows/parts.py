"""The parts of a row that a chunk can carry.

FULL    the whole row
COMMON  the columns that every group has, the rotary key, and their scales and sketches in sketched rows
OWN     the columns of one group
"""

import enum
from dataclasses import dataclass


class Part(enum.IntEnum):
    """The columns of a row that a chunk carries."""

    FULL = 0
    COMMON = 1
    OWN = 2


@dataclass(frozen=True)
class Field:
    """Items ``start ... stop - 1`` of a row, and the offset of the first in a part's payload."""

    start: int
    stop: int
    payload: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def side_by_side(*ranges: tuple[int, int]) -> tuple[Field, ...]:
    """Return the fields of ranges of a row that follow each other in the payload, without empty ranges."""
    fields, payload = [], 0
    for start, stop in ranges:
        if start < stop:
            fields.append(Field(start, stop, payload))
            payload += stop - start
    return tuple(fields)
