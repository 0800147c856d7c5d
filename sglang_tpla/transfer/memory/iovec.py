"""Extents of rows that lie side by side in a pool, to be copied, hashed, sent and received as one piece.

A request's rows lie in pages, and the tokens of one page (often those of several) follow each other in every layer.
A payload is then a few long pieces of the pool's own memory. If slots are scattered one by one, moving whole pieces
gains nothing, and rows are gathered instead (`rows`).
"""

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MIN_EXTENT_BYTES = 8 << 10  # on average; with shorter extents the calls cost more than the copy that they save
BLOCK_BYTES = 256 << 10  # small enough to stay in a core's cache between the copy and the checksum


def find_extents(slots: np.ndarray) -> np.ndarray:
    """Return ``slots`` as extents, in order: uint64 ``[extents, first slot and rows]``."""
    extents = np.zeros((0, 2), dtype=np.uint64)
    if slots.size:
        starts = np.concatenate(([0], np.flatnonzero(slots[1:] != slots[:-1] + 1) + 1))
        extents = np.empty((starts.size, 2), dtype=np.uint64)
        extents[:, 0], extents[:, 1] = slots[starts], np.diff(starts, append=slots.size)
    return extents


class Slots:
    """The slots of a request's tokens, with a cache of `find_extents` for parts of them.

    Results are kept because each layer asks for the same parts, and does so between two chunks, when the processor's
    caches hold little of the slots.
    """

    MOST = 64

    def __init__(self, slots: np.ndarray) -> None:
        self._slots = slots
        self._found: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._slots.size

    def part(self, first: int, count: int) -> np.ndarray:
        return self._slots[first : first + count]

    def extents(self, first: int, count: int) -> np.ndarray:
        extents = self._found.get((first, count))
        if extents is None:
            if len(self._found) >= self.MOST:
                self._found.clear()
            extents = self._found[first, count] = find_extents(self.part(first, count))
        return extents


def worth_it(extents: np.ndarray, rows: int, row_bytes: int) -> bool:
    """Return whether extents are long enough to be moved one by one."""
    return len(extents) * MIN_EXTENT_BYTES <= rows * row_bytes


def blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Yield a payload's rows in blocks of some `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return (slice(start, start + step) for start in range(0, rows, step))


@dataclass(frozen=True)
class IoVec:
    """A payload as pieces of memory, in order.

    Attributes:
        table: the pieces' addresses and sizes, uint64 ``[pieces, 2]``: the system's ``struct iovec``.
        memory: the owner of the pieces' memory, which keeps it alive.
    """

    table: np.ndarray
    memory: Any

    @cached_property
    def size_bytes(self) -> int:
        return int(self.table[:, 1].sum())

    @cached_property
    def views(self) -> list[memoryview]:
        """A uint8 view of each piece."""
        kinds = ((ctypes.c_uint8 * size, address) for address, size in self.table.tolist())
        return [memoryview(kind.from_address(address)).cast("B") for kind, address in kinds]


def one_piece(buffer: np.ndarray) -> IoVec:
    """Return a packed payload (uint8, contiguous) as one piece."""
    return IoVec(np.array([[buffer.ctypes.data, buffer.size]], dtype=np.uint64), buffer)


class Layers:
    """A pool's layers, uint8 ``[slots, row_bytes]`` and contiguous, with their addresses looked up once."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._rows = rows
        self._places = np.array([(layer.ctypes.data, layer.shape[1]) for layer in rows], dtype=np.uint64)

    def pieces(self, layers: range, extents: np.ndarray) -> IoVec:
        """Return the rows of ``extents`` (`find_extents`) in each of some layers (by index), layer by layer."""
        places = self._places[layers.start : layers.stop, None]  # [layers, 1, address and row bytes]
        table = extents * places[:, :, 1:]
        table[:, :, 0] += places[:, :, 0]
        # numpy may give the product another memory layout
        return IoVec(np.ascontiguousarray(table.reshape(-1, 2)), self._rows)


class Cursor:
    """A position in a payload's pieces, which advances as bytes move."""

    def __init__(self, pieces: IoVec) -> None:
        self._views = pieces.views
        self._ends: list[int] = np.cumsum(pieces.table[:, 1]).tolist()
        self._index, self._done_bytes = 0, 0

    def ahead(self, limit_bytes: int, limit_pieces: int) -> list[memoryview]:
        """Return the next pieces within both limits; none at the end."""
        found = []
        start = self._done_bytes - (self._ends[self._index - 1] if self._index else 0)
        for view in self._views[self._index : self._index + limit_pieces]:
            piece = view[start : start + limit_bytes]
            found.append(piece)
            limit_bytes -= piece.nbytes
            if limit_bytes == 0:
                break
            start = 0
        return found

    def advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._index = bisect_right(self._ends, self._done_bytes, self._index)
