"""The path of chunks into the pool. Connections hand over events on the I/O thread; worker threads write staged chunks
into the pool (`Receiver._write`) and check them. Other chunks are received in place (`in_place`).

A chunk is written only while its room's `WriteGate` allows it, once, and acknowledged after that; the metadata row is
written after the last chunk, and only then does the room succeed. The checksum is taken of the bytes that were written:
a damaged chunk does not count and is overwritten when it comes again, and a chunk whose place in shared memory was
reused meanwhile fails the check.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.chunks import layers_of
from sglang_tpla.transfer.decode.in_place import InPlaceChunk
from sglang_tpla.transfer.decode.rooms import Rooms, nack
from sglang_tpla.transfer.decode.state import AnyChunk, Connection, RetainedChunk, Room, Source, StagedChunk, chunk_id
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import one_piece
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.rows import RowWriter
from sglang_tpla.transfer.memory.staging import Staging
from sglang_tpla.transfer.network.data_channel import BufferPool
from sglang_tpla.transfer.workers import Workers, seconds_since

RoomMessage = messages.Chunk | messages.Share | messages.Want | messages.Finish | messages.Abort


class Receiver:
    """Takes chunks, writes them and completes rooms. The I/O thread calls the events, worker threads call `next_work`,
    and any thread may call `fail` and `turn`.

    Args:
        slots: places in this rank's shared segment, to keep payloads for the colocated ranks; None without a segment.
        buffers: the pool that takes staging memory back.
        put: queues a message for a prefill rank.
    """

    def __init__(
        self,
        workers: Workers,
        rooms: Rooms,
        pool: CachePool,
        metadata: MetadataRows,
        slots: Staging | None,
        buffers: BufferPool,
        put: Callable[[Connection, messages.Message], None],
    ) -> None:
        self._workers, self._rooms, self._put, self._buffers = workers, rooms, put, buffers
        self._io, self._counts = workers.io, workers.counts
        self._lock, self._work = workers.lock, workers.work
        self._metadata, self._slots = metadata, slots
        self._writer = RowWriter(pool)
        self._arrivals: deque[StagedChunk | InPlaceChunk] = deque()

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Hold the agent's lock while rooms change, then send their messages. Yields the time."""
        with self._work:
            try:
                yield self._io.now()
            finally:
                while self._rooms.out:
                    self._put(*self._rooms.out.popleft())
                if self._rooms.finishing:
                    self._work.notify()

    def fail(self, room: Room, reason: str) -> None:
        """Fail a room, once the writes under way have ended. The caller does not hold the agent's lock."""
        room.writes.end()
        with self.turn() as now:
            if not room.state.ended:
                self._rooms.fail(room, reason, now)

    # Events (I/O thread)

    def registered(self, connection: Connection, resumed: bool) -> None:
        """Let the rooms of a registered connection ask for rows, or resume them if the connection was broken."""
        with self.turn() as now:
            self._rooms.registered(connection, resumed, now)

    def lost(self, connection: Connection, reason: str) -> None:
        """Fail the rooms of a connection that is gone for good, or whose prefill process has ended."""
        with self._lock:
            rooms = self._rooms.of(connection)
        for room in rooms:
            self.fail(room, reason)
        with self.turn():
            self._rooms.forget(connection)

    def uses(self, connection: Connection) -> bool:
        """Return whether a room or a colocated rank would miss the messages that are lost with a connection."""
        with self._lock:
            return self._rooms.uses(connection)

    def starved(self, connection: Connection) -> list[Room]:
        """Return the rooms that wait for rows from a connection."""
        with self._lock:
            return self._rooms.starved(connection)

    def message(self, connection: Connection, message: messages.Message, payload: memoryview | None) -> None:
        if isinstance(message, messages.Release):
            with self.turn():
                self._rooms.release(connection, message.offsets)
            return
        if not isinstance(message, RoomMessage):
            name = type(message).__name__
            self._workers.drop("malformed_dropped", f"{name} is not for a decode rank ({connection.name})")
            return
        with self._lock:
            found = self._rooms.live(connection, message.room, message.generation)
            if found is None:
                self._counts["late_dropped"] += 1
                return
        room, source = found
        with self._failing(room, f"on {type(message).__name__}"):
            match message:
                case messages.Abort():
                    if not source.dummy:
                        self.fail(room, f"{connection.name}: {message.reason}")
                case messages.Want():
                    with self.turn():
                        self._rooms.want(room, source, message.total_bytes)
                case messages.Finish() if payload is not None:
                    with self.turn() as now:
                        wrong = self._rooms.finish(room, source, message, bytes(payload), now)
                    if wrong:
                        self.fail(room, f"{connection.name} finished with {wrong}")
                case messages.Chunk() if payload is not None:
                    self._take_chunk(room, source, message, payload, payload.nbytes)
                case messages.Share():
                    segment = connection.segments.get(message.agent)
                    end = message.offset + message.size_bytes
                    if segment is None or end > segment.nbytes:
                        with self._lock:
                            self._counts["checksum_failures"] += 1
                        self._put(connection, nack(message))
                    else:
                        self._take_chunk(room, source, message, segment[message.offset : end], 0)

    def _take_chunk(self, room: Room, source: Source, chunk: AnyChunk, payload: memoryview, credit_bytes: int) -> None:
        with self.turn() as now:
            if room.state.ended:
                self._counts["late_dropped"] += 1
                return
            if chunk_id(chunk) in source.applied or chunk_id(chunk) in source.pending:
                self._rooms.replay(room, source, chunk, credit_bytes)
                return
            wrong = self._rooms.wrong_chunk(room, source, chunk, payload.nbytes, credit_bytes)
            if not wrong:
                self._rooms.begin(source, chunk, credit_bytes)
                self._rooms.came(room, payload.nbytes, now, shared=not credit_bytes)
                self._arrivals.append(StagedChunk(room, source, chunk, payload, credit_bytes))
                self._work.notify()
                return
            self._counts["malformed_dropped"] += 1
        self.fail(room, f"{source.connection.name} sent chunk {chunk.sequence} {wrong}")

    def place(self, connection: Connection, chunk: messages.Chunk, size_bytes: int) -> InPlaceChunk | None:
        """Return the place in the pool of an arriving chunk, or None to receive it into staging: the chunk is wrong, it
        came before, the colocated ranks need its payload, or `RowWriter.pieces` has no place for it.
        """
        with self._lock:
            found = self._rooms.live(connection, chunk.room, chunk.generation)
            if found is None or chunk.relay:
                return None
            room, source = found
            if chunk_id(chunk) in source.applied or chunk_id(chunk) in source.pending:
                return None
            if self._rooms.wrong_chunk(room, source, chunk, size_bytes, size_bytes):
                return None
            extents = room.slots.extents(chunk.first_token, chunk.tokens)
            pieces = self._writer.pieces(layers_of(chunk), extents, Part(chunk.part))
            if pieces is None or room.after is not None:  # this thread does not wait
                return None
            self._rooms.begin(source, chunk, size_bytes)
            more = source.received_bytes < source.wanted_bytes  # a check of the last chunk overlaps with no receive
            return InPlaceChunk(room, source, chunk, pieces, more and self._workers.checks_aside)

    def received(self, chunk: InPlaceChunk) -> None:
        """Account for a chunk that was received whole in place. Check it here, or leave that to a worker."""
        with self._work:
            if not chunk.room.state.ended:
                self._rooms.came(chunk.room, chunk.size_bytes, self._io.now())
            if chunk.aside:
                self._arrivals.append(chunk)
                self._work.notify()
                return
        with self._failing(chunk.room):
            self._written(chunk, chunk.digest())

    def abandoned(self, chunk: InPlaceChunk) -> None:
        """Forget a chunk whose rest will not come."""
        with self._lock:
            self._rooms.abandon(chunk.source, chunk.chunk, chunk.size_bytes)

    # Work (worker threads)

    def next_work(self) -> Callable[[], None] | None:
        """Take a chunk to write or check, or a room that may be complete. The caller holds the lock."""
        if self._arrivals:
            return partial(self._write, self._arrivals.popleft())
        return partial(self._complete, self._rooms.finishing.popleft()) if self._rooms.finishing else None

    @contextmanager
    def _failing(self, room: Room, doing: str = "while writing") -> Iterator[None]:
        """Report an exception, and fail the room for it."""
        try:
            yield
        except Exception as error:
            self._workers.handler_failed(f"room {room.room_id}, {doing},", error)
            self.fail(room, f"internal error {doing}: {error!r}")

    def _write(self, chunk: StagedChunk | InPlaceChunk) -> None:
        """Write a staged chunk into the pool and check it, unless its room has ended; only check an in-place one."""
        with self._failing(chunk.room):
            if isinstance(chunk, InPlaceChunk):
                self._written(chunk, chunk.digest())
                return
            room, rows = chunk.room, chunk.chunk
            slots, layers = room.slots.part(rows.first_token, rows.tokens), layers_of(rows)
            digest = None  # of the written payload
            with room.writes.one() as allowed:
                if allowed:
                    digest = self._writer.write(layers, slots, Part(rows.part), chunk.payload, room.after)
            if digest is not None and rows.checksum == messages.OPENED:
                self._written(chunk, messages.OPENED)
            elif digest == b"":
                self._workers.aside(partial(self._check, chunk))
            else:
                self._written(chunk, digest)

    def _check(self, chunk: StagedChunk) -> None:
        with self._failing(chunk.room):
            self._written(chunk, check_pieces(one_piece(np.frombuffer(chunk.payload, dtype=np.uint8))))

    def _written(self, chunk: StagedChunk | InPlaceChunk, digest: bytes | None) -> None:
        """Account for a written chunk; ``digest`` is the checksum of the written bytes, None if the room had ended."""
        room, source, rows = chunk.room, chunk.source, chunk.chunk
        relayed = digest == rows.checksum and isinstance(rows, messages.Chunk) and rows.relay
        retained = self._retain(chunk) if relayed and isinstance(chunk, StagedChunk) else None
        with self.turn():
            sound = self._rooms.written(room, source, rows, chunk.credit_bytes, digest, retained)
        if not sound:
            text = "decode rank %d: chunk %d of room %d came damaged from the %s; asking for it again"
            self._workers.log.warning(text, self._workers.rank, rows.sequence, room.room_id, source.connection.name)
        if isinstance(chunk, StagedChunk):
            self._buffers.give_back(chunk.payload)
        self._complete(room)

    def _retain(self, chunk: StagedChunk) -> RetainedChunk | None:
        """Copy a payload into the shared segment for the colocated ranks. Return None if there is no place for it."""
        if self._slots is None:
            return None
        with self._lock:
            slot = self._slots.take()
        if slot is None:
            return None
        size = chunk.payload.nbytes
        slot.buffer[:size] = np.frombuffer(chunk.payload, dtype=np.uint8)
        return RetainedChunk(chunk.room, chunk.source.connection, slot, size, self._io.now())

    def _complete(self, room: Room) -> None:
        """Write the metadata row and end the room with success, if every source is complete; check coverage first."""
        with self._failing(room):
            with self._lock:
                if room.state.ended or not all(source.complete for source in room.sources.values()):
                    return
            assert room.coverage is not None
            sending = [source for source in room.sources.values() if not source.dummy]
            if missing := room.coverage.missing(sending[0].tokens):
                self.fail(room, missing)
                return
            with room.writes.one(last=True) as allowed:  # all rows have been written
                if not allowed:
                    return
                if self._metadata.buffers:
                    self._metadata.write(room.metadata_row, sending[-1].metadata)
            with self.turn() as now:
                if not room.state.ended:
                    self._rooms.succeed(room, now)
                    self._workers.took(seconds_since(room.requested, now))
