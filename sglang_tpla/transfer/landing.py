"""Inside the decode agent: a chunk that goes from the socket straight to its place in the pool.

What staging is for, that nothing late is written, holds here piece by piece: each call writes at most `PIECE_BYTES`,
while the room's `Writes` allow it, and what comes for a room that has ended goes to memory
that nobody reads. The worker thread takes the checksum of the whole from the pool.
"""

from __future__ import annotations

import os
import socket

from sglang_tpla.transfer import frames
from sglang_tpla.transfer.receiving import Room, Source
from sglang_tpla.transfer.runs import Cursor, Pieces, checksum_of

PIECE_BYTES = 2 << 20
MAX_PIECES = 1024  # of one call: IOV_MAX
_nowhere = memoryview(bytearray(PIECE_BYTES))


class PoolLanding:
    """A chunk whose bytes have their places in the pool.

    Args:
        pieces: the places, in the payload's order.
    """

    def __init__(self, room: Room, source: Source, chunk: frames.Chunk, pieces: Pieces) -> None:
        self.room, self.source, self.chunk = room, source, chunk
        self.size_bytes = self.credit_bytes = pieces.size_bytes
        self._pieces, self._cursor = pieces, Cursor(pieces)
        self._left_bytes = self.size_bytes
        self._whole = True

    def receive(self, stream: socket.socket) -> int:
        """Take some of the payload from a socket that does not block: bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: there is nothing now.
            OSError: the connection is gone.
        """
        with self.room.writes.one() as allowed:
            self._whole = self._whole and allowed
            if self._whole:
                size = os.readv(stream.fileno(), self._cursor.ahead(PIECE_BYTES, MAX_PIECES))
        if not self._whole:
            size = stream.recv_into(_nowhere[: self._left_bytes])
        self._left_bytes -= size
        self._cursor.advance(size)
        return size

    def digest(self) -> bytes | None:
        """Checksum of what was written; None if not all of it was."""
        if not self._whole or self._left_bytes:
            return None
        return checksum_of(self._pieces)
