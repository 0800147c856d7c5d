"""In-place receive: a chunk goes from the socket straight to its place in the pool.

As with staging, no byte is written after the room's end: each call writes at most `PIECE_BYTES` while the room's
`WriteGate` allows it, and the bytes for a room that has ended go to memory that nobody reads.
"""

import socket

from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.state import Room, Source
from sglang_tpla.transfer.memory.copy import UNCHECKED, SocketCopy, check_pieces
from sglang_tpla.transfer.memory.iovec import IoVec
from sglang_tpla.transfer.network.sealing import SealedIntake

PIECE_BYTES = 16 << 20
_nowhere = memoryview(bytearray(1 << 20))


class InPlaceChunk:
    """A chunk that is received into its place in the pool. The I/O thread receives it; any thread may take its digest.

    Args:
        pieces: the places, in the payload's order.
        aside: True if `digest` computes the checksum from the pool afterwards, and `receive` does not.
    """

    def __init__(self, room: Room, source: Source, chunk: messages.Chunk, pieces: IoVec, aside: bool) -> None:
        self.room, self.source, self.chunk, self.aside = room, source, chunk, aside
        self.size_bytes = self.credit_bytes = pieces.size_bytes
        self._pieces = pieces
        self._intake: SocketCopy | SealedIntake = SocketCopy(pieces, UNCHECKED if aside else b"")
        self._left_bytes = self.size_bytes
        self._whole = True

    def open_with(self, context: AEADDecryptionContext) -> None:
        """Decrypt the payload into its place in the pool; the tag then replaces the checksum."""
        self._intake, self.aside = SealedIntake(self._pieces, context), False

    def receive(self, stream: socket.socket) -> int:
        """Take some of the payload from a non-blocking socket. Return how many bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: the socket has nothing now.
            OSError: the connection is gone.
        """
        with self.room.writes.one() as allowed:
            self._whole = self._whole and allowed
            if self._whole:
                size = self._intake.receive(stream, PIECE_BYTES)
        if not self._whole:
            size = stream.recv_into(_nowhere[: self._left_bytes])
        self._left_bytes -= size
        return size

    def digest(self) -> bytes | None:
        """Return the checksum of the written payload, OPENED if it came sealed, None if not all of it was written."""
        if not self._whole or self._left_bytes:
            return None
        if isinstance(self._intake, SealedIntake):
            return messages.OPENED
        return check_pieces(self._pieces) if self.aside else self._intake.digest()
