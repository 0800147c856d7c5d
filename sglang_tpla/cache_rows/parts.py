"""Which part of a row travels: the whole, what every latent group has, or what one group has.

FULL    the whole row
COMMON  the columns that every group has, the rotary key, and what goes with them
OWN     the columns of one group
"""

import enum
from dataclasses import dataclass


class Part(enum.IntEnum):
    """Which columns of a row a chunk carries."""

    FULL = 0
    COMMON = 1
    OWN = 2


@dataclass(frozen=True)
class Field:
    """Items ``start ... stop - 1`` of a row, and where they begin in a part's payload."""

    start: int
    stop: int
    payload: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def side_by_side(*ranges: tuple[int, int]) -> tuple[Field, ...]:
    """Return the fields of ranges of a row that follow each other in the payload; empty ranges are left out."""
    fields, payload = [], 0
    for start, stop in ranges:
        if start < stop:
            fields.append(Field(start, stop, payload))
            payload += stop - start
    return tuple(fields)
