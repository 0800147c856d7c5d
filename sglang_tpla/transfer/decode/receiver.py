"""Inside the decode agent: chunks on their way into the pool. `RoomEvents` come in on the I/O thread; worker threads
write chunks into the pool, but for those that came there by themselves (`in_place`), and check them.

A chunk is written only while its room's `WriteGate` allows it, once, and acknowledged after that; the metadata row is
written after the last chunk, and only then does the room succeed. What is checked is what was written: a damaged
chunk does not count and is written over when it comes again, and one in an arena whose place was used anew meanwhile
fails the check.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.in_place import InPlaceChunk
from sglang_tpla.transfer.decode.rooms import Rooms, nack
from sglang_tpla.transfer.decode.state import Connection, RetainedChunk, Room, Source, StagedChunk
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import one_piece
from sglang_tpla.transfer.memory.rows import RowWriter
from sglang_tpla.transfer.memory.staging import Staging
from sglang_tpla.transfer.network.data_channel import Spares
from sglang_tpla.transfer.room import CachePool, MetadataRows
from sglang_tpla.transfer.workers import Workers, seconds_since


class Receiver:
    """The rooms' threads: `work_once` is theirs, events are the I/O thread's, `fail` and `turn` are anybody's.

    Args:
        slots: of this rank's arena, where payloads are kept for the neighbours; None without one.
        put: queues a message for a prefill rank.
    """

    def __init__(
        self,
        workers: Workers,
        rooms: Rooms,
        pool: CachePool,
        metadata: MetadataRows,
        slots: Staging | None,
        spares: Spares,
        put: Callable[[Connection, frames.Message], None],
    ) -> None:
        self._workers, self._rooms, self._put, self._spares = workers, rooms, put, spares
        self._metadata, self._slots = metadata, slots
        self._writer = RowWriter(pool)
        self._arrivals: deque[StagedChunk | InPlaceChunk] = deque()
        self._completed: deque[Room] = deque()

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Hold the agent's lock while rooms change, and send what they have to say; gives the time."""
        with self._workers.work:
            try:
                yield self._workers.io.now()
            finally:
                out, self._rooms.out = self._rooms.out, []
                for connection, message in out:
                    self._put(connection, message)

    def fail(self, room: Room, reason: str) -> None:
        """Fail a room, without the agent's lock while a write ends."""
        room.writes.end()
        with self.turn() as now:
            if not room.state.ended:
                self._rooms.fail(room, reason, now)

    def advance(self, room: Room, now: float) -> None:
        """Move a room on; in a `turn`."""
        if self._rooms.advance(room, now):
            self._completed.append(room)
            self._workers.work.notify()

    # Events (I/O thread)

    def registered(self, connection: Connection, resumed: bool) -> None:
        """A connection stands, for the first time or ``resumed``."""
        with self.turn() as now:
            if resumed:
                self._workers.counts["resumed"] += 1
                self._rooms.resume(connection, now)
            for room in list(self._rooms.table.values()):
                if connection.address in room.sources:
                    self.advance(room, now)

    def lost(self, connection: Connection, reason: str) -> None:
        """A connection, or the process behind it, is gone for good."""
        with self._workers.lock:
            rooms = self._rooms.of(connection)
        for room in rooms:
            self.fail(room, reason)
        with self.turn():
            self._rooms.release_of(connection)

    def failed(self, connection: Connection, room_id: int, message: frames.Message, error: Exception) -> None:
        """An exception while a message about a room was handled."""
        with self._workers.lock:
            room = self._rooms.table.get(room_id)
        if room is not None and connection.address in room.sources:
            self.fail(room, f"internal error on {type(message).__name__}: {error!r}")

    def uses(self, connection: Connection) -> bool:
        """Whether a room that is not complete waits for a connection, or something is kept for its neighbours."""
        with self._workers.lock:
            return self._rooms.uses(connection)

    def starved(self, connection: Connection) -> list[Room]:
        """Rooms that want rows that have not come over a connection."""
        with self._workers.lock:
            return self._rooms.starved(connection)

    def message(self, connection: Connection, message: frames.Message, payload: memoryview | None) -> None:
        """One message about a room."""
        if isinstance(message, frames.Release):
            with self.turn():
                self._rooms.release_of(connection, message.offsets)
            return
        if not isinstance(message, frames.Chunk | frames.Share | frames.Want | frames.Finish | frames.Abort):
            name = type(message).__name__
            self._workers.drop("malformed_dropped", f"{name} is not for a decode rank ({connection.name})")
            return
        with self._workers.lock:
            found = self._rooms.live(connection, message.room, message.generation)
            if found is None:
                self._workers.counts["late_dropped"] += 1
                return
        room, source = found
        match message:
            case frames.Abort():
                if not source.dummy:
                    self.fail(room, f"{connection.name}: {message.reason}")
            case frames.Want():
                with self.turn():
                    self._rooms.want(room, source, message.total_bytes)
            case frames.Finish() if payload is not None:
                self._take_finish(room, source, message, bytes(payload))
            case frames.Chunk() if payload is not None:
                self._take_chunk(room, source, message, payload, payload.nbytes)
            case frames.Share():
                arena = connection.arenas.get(message.agent)
                end = message.offset + message.size_bytes
                if arena is None or end > arena.nbytes:
                    self._workers.counts["checksum_failures"] += 1
                    self._put(connection, nack(message))
                else:
                    self._take_chunk(room, source, message, arena[message.offset : end], 0)

    def _take_finish(self, room: Room, source: Source, message: frames.Finish, metadata: bytes) -> None:
        with self.turn() as now:
            wrong = self._rooms.finish(room, source, message, metadata, now)
            if not wrong:
                self._completed.append(room)
                self._workers.work.notify()
                return
        self.fail(room, f"{source.connection.name} finished with {wrong}")

    def _take_chunk(
        self,
        room: Room,
        source: Source,
        chunk: frames.Chunk | frames.Share,
        payload: memoryview,
        credit_bytes: int,
    ) -> None:
        counts = self._workers.counts
        with self.turn() as now:
            if room.state.ended:
                counts["late_dropped"] += 1
                return
            key = (chunk.part, chunk.sequence)
            if key in source.applied or key in source.pending:
                self._rooms.replay(room, source, chunk, credit_bytes)
                return
            wrong = self._rooms.wrong_chunk(room, source, chunk, payload.nbytes, credit_bytes)
            if not wrong:
                self._rooms.begin(source, chunk, credit_bytes)
                self._rooms.arrived(room, payload.nbytes, now)
                if not credit_bytes:
                    room.shared_memory_bytes += payload.nbytes
                    counts["shared_memory_bytes"] += payload.nbytes
                self._arrivals.append(StagedChunk(room, source, chunk, payload, credit_bytes))
                self._workers.work.notify()
                return
            counts["malformed_dropped"] += 1
        self.fail(room, f"{source.connection.name} sent chunk {chunk.sequence} {wrong}")

    def place(self, connection: Connection, chunk: frames.Chunk, size_bytes: int) -> InPlaceChunk | None:
        """A chunk goes into the pool at once if nothing is wrong with it and nobody else needs its payload."""
        key = (chunk.part, chunk.sequence)
        with self._workers.lock:
            found = self._rooms.live(connection, chunk.room, chunk.generation)
            if found is None or chunk.relay:
                return None
            room, source = found
            if key in source.applied or key in source.pending:
                return None
            if self._rooms.wrong_chunk(room, source, chunk, size_bytes, size_bytes):
                return None
            spans = room.slots.spans(chunk.first_token, chunk.tokens)
            pieces = self._writer.pieces(self._layers(chunk), spans, Part(chunk.part))
            if pieces is None:
                return None
            self._rooms.begin(source, chunk, size_bytes)
            more = source.received_bytes < source.wanted_bytes  # the last one would only wait for its check
            return InPlaceChunk(room, source, chunk, pieces, more and self._workers.checks_aside)

    def received(self, chunk: InPlaceChunk) -> None:
        """A chunk is in the pool, or what came of it when its room had ended is nowhere."""
        with self._workers.work:
            if not chunk.room.state.ended:
                self._rooms.arrived(chunk.room, chunk.size_bytes, self._workers.io.now())
            if chunk.aside:
                self._arrivals.append(chunk)
                self._workers.work.notify()
                return
        with self._failing(chunk.room):
            self._settle(chunk)

    def abandoned(self, chunk: InPlaceChunk) -> None:
        """The rest of a chunk will not come."""
        with self._workers.lock:
            self._rooms.abandoned(chunk.source, chunk.chunk, chunk.size_bytes)

    # Work (worker threads)

    def next_work(self) -> Callable[[], None] | None:
        """Take a chunk or a room that may be complete; under the lock."""
        if self._arrivals:
            return partial(self._work_on, self._arrivals.popleft())
        return partial(self._finish, self._completed.popleft()) if self._completed else None

    def _work_on(self, arrival: StagedChunk | InPlaceChunk) -> None:
        with self._failing(arrival.room):
            if isinstance(arrival, StagedChunk):
                self._apply(arrival)
            else:
                self._settle(arrival)

    def _finish(self, room: Room) -> None:
        with self._failing(room):
            self._complete(room)

    @contextmanager
    def _failing(self, room: Room) -> Iterator[None]:
        """What goes wrong in here fails the room, and is reported."""
        try:
            yield
        except Exception as error:
            self._workers.handler_failed(f"write of room {room.room_id}", error)
            self.fail(room, f"internal error while writing: {error!r}")

    def _layers(self, chunk: frames.Chunk | frames.Share) -> range:
        first = chunk.first_layer - self._writer.pool.first_layer
        return range(first, first + chunk.layers)

    def _apply(self, arrival: StagedChunk) -> None:
        room, chunk = arrival.room, arrival.chunk
        slots = room.slots.part(chunk.first_token, chunk.tokens)
        digest = None  # of what was written
        with room.writes.one() as allowed:
            if allowed:
                layers, part = self._layers(chunk), Part(chunk.part)
                digest = self._writer.write(layers, slots, part, arrival.payload)
        if digest is not None and chunk.checksum == frames.OPENED:
            self._written(arrival, frames.OPENED)
        elif digest == b"":
            self._workers.aside(partial(self._check, arrival))
        else:
            self._written(arrival, digest)

    def _check(self, arrival: StagedChunk) -> None:
        with self._failing(arrival.room):
            data = np.frombuffer(arrival.payload, dtype=np.uint8)
            self._written(arrival, check_pieces(one_piece(data)))

    def _written(self, arrival: StagedChunk, digest: bytes | None) -> None:
        """A chunk was written, with this checksum; with none, its room had ended."""
        chunk, sound = arrival.chunk, digest == arrival.chunk.checksum
        relayed = sound and isinstance(chunk, frames.Chunk) and chunk.relay
        self._account(arrival, digest, self._retain(arrival) if relayed else None)
        self._spares.give_back(arrival.payload)
        self._complete(arrival.room)

    def _settle(self, chunk: InPlaceChunk) -> None:
        self._account(chunk, chunk.digest(), None)
        self._complete(chunk.room)

    def _account(
        self,
        arrival: StagedChunk | InPlaceChunk,
        digest: bytes | None,
        retained: RetainedChunk | None,
    ) -> None:
        with self.turn():
            if self._rooms.account(arrival, digest, retained):
                return
        self._workers.log.warning(
            "decode rank %d: chunk %d of room %d came damaged from the %s; asking for it again",
            self._workers.rank,
            arrival.chunk.sequence,
            arrival.room.room_id,
            arrival.source.connection.name,
        )

    def _retain(self, arrival: StagedChunk) -> RetainedChunk | None:
        """Copy a payload into the arena for the neighbours; None if there is no place for it."""
        if self._slots is None:
            return None
        with self._workers.lock:
            slot = self._slots.take()
        if slot is None:
            return None
        size = arrival.payload.nbytes
        slot.buffer[:size] = np.frombuffer(arrival.payload, dtype=np.uint8)
        return RetainedChunk(arrival.room, arrival.source.connection, slot, size, self._workers.io.now())

    def _complete(self, room: Room) -> None:
        """Write the metadata row and succeed, once every source is complete and the chunks are the request."""
        with self._workers.lock:
            if room.state.ended or not all(source.complete for source in room.sources.values()):
                return
        assert room.coverage is not None
        sending = [source for source in room.sources.values() if not source.dummy]
        if missing := room.coverage.missing(sending[0].tokens):
            self.fail(room, missing)
            return
        with room.writes.one(last=True) as allowed:  # all else that was due has been written
            if not allowed:
                return
            if self._metadata.buffers:
                self._metadata.write(room.metadata_row, sending[-1].metadata)
        with self.turn() as now:
            if not room.state.ended:
                self._rooms.succeed(room, now)
                self._workers.took(seconds_since(room.requested, now))
