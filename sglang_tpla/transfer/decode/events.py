"""Inside the decode agent: what its connections tell whoever has the rooms. All of it comes on the I/O thread."""

from __future__ import annotations

from typing import Protocol

from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.in_place import InPlaceChunk
from sglang_tpla.transfer.decode.state import Connection, Room


class RoomEvents(Protocol):
    """Called without the agent's lock."""

    def registered(self, connection: Connection, resumed: bool) -> None:
        """A connection stands, for the first time or ``resumed``: rooms ask, or go on where they were."""

    def lost(self, connection: Connection, reason: str) -> None:
        """A connection, or the process behind it, is gone for good: its rooms fail."""

    def message(self, connection: Connection, message: frames.Message, payload: memoryview | None) -> None:
        """One message about a room."""

    def failed(self, connection: Connection, room_id: int, message: frames.Message, error: Exception) -> None:
        """An exception while a message about a room was handled."""

    def place(self, connection: Connection, chunk: frames.Chunk, size_bytes: int) -> InPlaceChunk | None:
        """The place in the pool of a chunk that begins to come; None for staging."""

    def received(self, chunk: InPlaceChunk) -> None:
        """A chunk has come whole to its place."""

    def abandoned(self, chunk: InPlaceChunk) -> None:
        """The rest of a chunk will not come."""

    def uses(self, connection: Connection) -> bool:
        """Whether a room that is not complete waits for a connection, or something is kept for its neighbours."""

    def starved(self, connection: Connection) -> list[Room]:
        """Rooms that want rows that have not come over a connection."""

    def fail(self, room: Room, reason: str) -> None:
        """End a room."""
